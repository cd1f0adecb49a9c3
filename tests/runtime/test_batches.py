"""Any number of sequences together: nothing is compiled in mid-answer, and none is lost."""

from dataclasses import replace

import pytest
from models import eager_compile, random_artifact

from eepass.config import ExitConfig
from eepass.model import EarlyExitModel
from eepass.passes.report import PassReport
from eepass.runtime.drafting.model_draft import ModelDraft
from eepass.runtime.drafting.planner import Planner
from eepass.runtime.engine.batch import Request, decode_batch
from eepass.runtime.exits.exits import ROW_COUNTS
from eepass.runtime.sampling import GREEDY, Sampling

PROMPTS = [[5 + n, 9, 44 + 2 * n, 7, 8 * n + 3] for n in range(12)]
CONFIGS = {
    "exact": ExitConfig(),
    "exits": ExitConfig(speculate="off", adaptive=False, threshold=0.3),
    "approximate": ExitConfig(threshold=0.3).approximate(),
    "propagate": ExitConfig(
        kv="propagate", guarantee="approximate", speculate="off", adaptive=False, threshold=0.3
    ),
    "exits and drafts": ExitConfig(adaptive=False, threshold=0.3),
    "approximate, exits and drafts": ExitConfig(
        adaptive=False, guarantee="approximate", threshold=0.3
    ),
    "look-up": ExitConfig(speculate="suffix", exits=False, adaptive=False),
    "a small model": ExitConfig(speculate="model", exits=False, adaptive=False),
    "paper": ExitConfig.preset("paper"),
}


class CountingCompiler:
    """Counts the graphs it was given; the graphs run as they are."""

    def __init__(self):
        self.structures = []

    def __call__(self, graph, structure, examples, *, logits=False):
        self.structures.append(structure)
        return eager_compile(graph, structure, examples)


@pytest.fixture
def compiler():
    return CountingCompiler()


@pytest.fixture
def model(llama, llama_splits, compiler):
    """The tiny llama with exits, as yet not compiled."""

    def made(artifact):
        return EarlyExitModel(llama_splits, PassReport(), frozenset(), artifact, compiler=compiler)

    found = made(random_artifact(llama))
    found.draft = ModelDraft(made(None).decoder)
    segments_for = found.segments_for

    def as_in_a_folder(config, plan, tensors, rows):
        assert rows in ROW_COUNTS, f"a folder has no exits for {rows} rows"
        return segments_for(config, plan, tensors, rows)

    found.segments_for = as_in_a_folder
    return found


def requests_of(count, limit, sampling=GREEDY):
    return [Request(prompt, limit, frozenset(), sampling) for prompt in PROMPTS[:count]]


def answers(engine, requests):
    found = {id(request): [] for request in requests}
    for request, token in decode_batch(engine, requests):
        found[id(request)].append(token)
    return list(found.values())


def in_small_slots(engine, prompts, limit):
    return [engine.start(ids, limit, capacity=len(ids) + limit) for ids in prompts]


@pytest.mark.parametrize("count", (1, 2, 6))
@pytest.mark.parametrize("name", CONFIGS)
def test_nothing_is_compiled_after_the_first_token(model, compiler, name, count):
    engine = model.configure(CONFIGS[name])
    sequences = in_small_slots(engine, PROMPTS[:count], 6)
    before = list(compiler.structures)
    assert before
    # together, then one by one, so that many tokens are pending at once
    while going := [one for one in sequences if not one.at_its_end]:
        engine.step(going)
        for one in going:
            if not one.at_its_end:
                engine.step([one])
    engine.catch_up()
    assert compiler.structures == before
    engine.reset()


def test_one_dense_sequence_compiles_one_row_only(model, compiler):
    engine = model.configure(dense=True)
    sequence = engine.start([5])
    engine.step()
    assert {rows for rows, _ in engine.decoder._layers} == {1}
    engine.end(sequence)


@pytest.mark.parametrize("name", CONFIGS)
def test_any_number_of_sequences_is_answered(model, name):
    for count in (1, 6, 9, 12):
        engine = model.configure(CONFIGS[name])
        found = answers(engine, requests_of(count, 5))
        assert [len(tokens) for tokens in found] == [5] * count


@pytest.mark.parametrize("name", ("approximate", "propagate"))
@pytest.mark.parametrize("sampling", (GREEDY, Sampling(temperature=1.0, seed=3)))
def test_neighbours_change_nothing(model, name, sampling):
    """The exits of a sequence, and what is drawn there, are its own."""
    # one pending token is what each of five sequences may have as well
    engine = model.configure(replace(CONFIGS[name], pending=1))
    alone = [answers(engine, [request])[0] for request in requests_of(5, 10, sampling)]
    assert engine.statistics.mean_exit_layer < engine.decoder.num_layers
    assert answers(engine, requests_of(5, 10, sampling)) == alone


@pytest.mark.parametrize(("sixteen", "looks"), ((2.0, False), (1.3, True)))
def test_nobody_looks_for_draft_tokens_that_cannot_pay(model, monkeypatch, sixteen, looks):
    """Eight sequences leave one draft token for each, in a pass of twice the rows."""
    engine = model.configure(replace(CONFIGS["exact"], exits=False, remember=False))
    engine.measure()
    proposed = []
    propose = type(engine.draft).propose

    def counted(self, root, budget, read):
        proposed.append(root)
        return propose(self, root, budget, read)

    monkeypatch.setattr(type(engine.draft), "propose", counted)
    engine.planner = Planner({1: 1.0, 8: 1.0, 16: sixteen}, modes=("dense", "speculation"))
    engine._observes = False
    monkeypatch.setattr(engine, "step_rows", 16)
    sequences = in_small_slots(engine, PROMPTS[:8], 6)
    for _ in range(3):
        engine.step(sequences)
    assert bool(proposed) == looks
    # fewer of them leave rows that cost nothing
    engine.step(sequences[:7])
    assert proposed
    engine.reset()
