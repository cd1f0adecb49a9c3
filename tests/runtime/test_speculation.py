"""Whatever is drafted and wherever tokens exit, exact decoding equals dense decoding."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import VOCABULARY, eager_compile
from plain import PlainEngine, RandomDraft, RandomExits

from eepass.runtime.decoder.decoder import Decoder
from eepass.runtime.engine import forward_pass
from eepass.runtime.engine.engine import Engine
from eepass.runtime.engine.options import Options
from eepass.runtime.sampling import Sampling

DEPTH = 4
# a prompt after which the tiny model does not fall into repetition at once
PROMPT = [63, 80, 29, 104, 125]
MODES = {"exits": ("exits",), "speculation": ("speculation",), "both": ("both",)}


@pytest.fixture(scope="module")
def decoder(llama_splits):
    return Decoder(llama_splits, eager_compile)


@pytest.fixture(scope="module")
def plain(llama):
    return PlainEngine(llama)


class SpyingEngine(Engine):
    """Knows which tokens the rows of the current pass follow, for exits that are right."""

    def current_texts(self):
        return {
            index: [*row.scheduled.sequence.tokens[: row.scheduled.sequence.position], *path(row)]
            for index, row in enumerate(self.current.rows)
            if row.node != forward_pass.PENDING
        }


def path(row):
    tree = row.scheduled.tree
    return [tree.tokens[node] for node in [0, *tree.path(row.node)]]


@pytest.fixture(autouse=True)
def remember_the_pass(monkeypatch):
    """Let a spying engine see the rows of its pass."""
    original = forward_pass.ForwardPass._run_predictors

    def run_predictors(self, layer):
        SpyingEngine.current = self
        original(self, layer)

    monkeypatch.setattr(forward_pass.ForwardPass, "_run_predictors", run_predictors)


def engine_for(decoder, plain, seed, mode, guarantee="exact", right=0.6, **options):
    made = []
    exits = None
    if mode != "speculation":
        exits = RandomExits(lambda: made[0], plain, DEPTH, seed, right=right)
    draft = RandomDraft(plain, seed, right) if mode != "exits" else None
    chosen = Options(guarantee, modes=MODES[mode], **options)
    made.append(SpyingEngine(decoder, exits, None, draft, chosen))
    return made[0]


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    mode=st.sampled_from(sorted(MODES)),
    count=st.integers(1, 24),
    limit=st.integers(0, 7),
    stops=st.sets(st.integers(3, VOCABULARY - 1), max_size=12),
)
def test_exact_decoding_equals_the_plain_engine(decoder, plain, seed, mode, count, limit, stops):
    engine = engine_for(decoder, plain, seed, mode, pending_limit=limit)
    generated = [step.token for step in engine.generate(PROMPT, count, frozenset(stops))]
    assert generated == plain.answer(PROMPT, count, stops)
    assert engine.sequences == []


def test_exits_are_rolled_back_and_drafts_accepted(decoder, plain):
    """The property above is not empty: there are rollbacks, and several tokens a pass."""
    for mode in MODES:
        engine = engine_for(decoder, plain, 1, mode, right=0.8)
        list(engine.generate(PROMPT, 30))
        if mode != "speculation":
            assert engine.statistics.rollbacks > 1
            assert engine.statistics.mean_exit_layer < DEPTH
        if mode != "exits":
            assert engine.statistics.summary()["accepted_per_pass"] > 1.2


def test_without_roll_back_the_answer_would_be_another(decoder, plain):
    exact = engine_for(decoder, plain, 3, "exits", right=0.2)
    loose = engine_for(decoder, plain, 3, "exits", "approximate", right=0.2)
    dense = plain.answer(PROMPT, 30)
    assert [step.token for step in exact.generate(PROMPT, 30)] == dense
    assert [step.token for step in loose.generate(PROMPT, 30)] != dense


def test_a_tree_without_its_mask_gives_another_answer(decoder, plain, monkeypatch):
    """It is the mask that keeps rows from attending to draft tokens of other paths."""
    original = decoder.side_inputs.gather

    def everything(rows, size):
        return original([row._replace(path_slots=()) for row in rows], size)

    answers = set()
    for gather in (original, everything):
        monkeypatch.setattr(decoder.side_inputs, "gather", gather)
        engine = engine_for(decoder, plain, 5, "speculation")
        answers.add(tuple(step.token for step in engine.generate(PROMPT, 40)))
    assert tuple(plain.answer(PROMPT, 40)) in answers and len(answers) == 2


def test_without_moving_what_was_accepted_the_answer_would_be_another(decoder, plain, monkeypatch):
    monkeypatch.setattr(decoder.kv, "move", lambda *rest: None)
    engine = engine_for(decoder, plain, 5, "speculation")
    assert [step.token for step in engine.generate(PROMPT, 40)] != plain.answer(PROMPT, 40)


@pytest.mark.parametrize("mode", sorted(MODES))
def test_the_cache_is_the_dense_one_afterwards(decoder, plain, mode):
    engine = engine_for(decoder, plain, 11, mode)
    ids = [*PROMPT, *(step.token for step in engine.generate(PROMPT, 25))][:-1]
    ours = [k[:, :, : len(ids)].clone() for k in (*decoder.kv.keys, *decoder.kv.values)]
    list(Engine(decoder).generate(PROMPT, 25))
    dense = [k[:, :, : len(ids)] for k in (*decoder.kv.keys, *decoder.kv.values)]
    for own, other in zip(ours, dense, strict=True):
        assert torch.allclose(own, other, atol=2e-5)


def test_a_stream_sees_only_what_is_confirmed(decoder, plain):
    engine = engine_for(decoder, plain, 2, "exits", right=0.3)
    dense = plain.answer(PROMPT, 20)
    seen = []
    for step in engine.generate(PROMPT, 20):
        seen.append(step.token)
        assert seen == dense[: len(seen)]
        unconfirmed = engine.sequences[0].tokens[len(PROMPT) :]
        assert len(unconfirmed) >= len(seen)


def test_the_end_of_the_cache(decoder, plain):
    prompt = [5 + i % 90 for i in range(decoder.capacity - 6)]
    engine = engine_for(decoder, plain, 4, "both")
    generated = []
    with pytest.raises(ValueError, match="raise max_length"):
        for step in engine.generate(prompt, 100):
            generated.append(step.token)
    assert generated == plain.answer(prompt, len(generated)) and len(generated) >= 6
    assert list(engine.generate(PROMPT, 3))


def test_the_schedule_forgets_what_is_rolled_back():
    from eepass.runtime.exits.scheduler import PredictorSchedule

    schedule = PredictorSchedule([3, 10, 20], 1)
    schedule.record(10)
    before = schedule.active()
    for layer in (20, 20, 20, 20, 20, 20):
        schedule.record(layer)
    assert schedule.active() != before
    schedule.forget(6)
    assert schedule.active() == before


def test_approximate_with_both_commits_at_exits(decoder, plain):
    engine = engine_for(decoder, plain, 8, "both", "approximate", right=1.0)
    generated = [step.token for step in engine.generate(PROMPT, 30)]
    # exits that are always right change nothing but the layer
    assert generated == plain.answer(PROMPT, 30)
    assert engine.statistics.mean_exit_layer < DEPTH and engine.statistics.rollbacks == 0


@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_a_batch_gives_what_each_sequence_gives_alone(decoder, plain, data):
    """Sequences of different lengths, joining and leaving at any pass."""
    mode = data.draw(st.sampled_from(sorted(MODES)))
    engine = engine_for(decoder, plain, data.draw(st.integers(0, 10**6)), mode, pending_limit=3)
    prompts = [
        ([int(x) for x in data.draw(st.lists(st.integers(3, 150), min_size=1, max_size=20))], count)
        for count in data.draw(st.lists(st.integers(1, 8), min_size=2, max_size=4))
    ]
    answers = {}
    running = {}
    try:
        while prompts or running:
            if (
                prompts
                and len(running) < 3
                and data.draw(st.booleans() if running else st.just(True))
            ):
                prompt, count = prompts.pop()
                sequence = engine.start(prompt, count, capacity=34)
                running[sequence] = (prompt, count)
            for sequence in [s for s in running if s.finished]:
                prompt, count = running.pop(sequence)
                generated = sequence.tokens[len(prompt) : sequence.num_confirmed]
                assert generated == plain.answer(prompt, count)
                answers[tuple(prompt)] = generated
                engine.end(sequence)
            going = [s for s in running if not s.at_its_end]
            ending = [s for s in running if s.at_its_end and not s.finished]
            if going:
                engine.step(going)
            if ending:
                engine.catch_up(ending)
        assert engine.sequences == [] and answers
    finally:
        # an example that hypothesis cuts short leaves its sequences behind
        engine.reset()


@pytest.mark.parametrize("draws", [800, pytest.param(5000, marks=pytest.mark.slow)])
def test_sampling_in_exact_mode_draws_from_the_dense_distribution(decoder, plain, llama, draws):
    """Exits mostly wrong, draft tokens at random: two tokens are distributed as dense ones."""
    sampling = Sampling(temperature=3.0, top_k=6, seed=5)
    counts = {}
    engine = engine_for(decoder, plain, 9, "both", right=0.1)
    generator = sampling.generator()
    for _ in range(draws):
        sequence = engine.start(PROMPT, 3, sampling=sampling)
        sequence.generator = generator
        # the first token is the same for all, so that the next two can be compared
        sequence.replace_last(11)
        while not sequence.finished:
            if sequence.at_its_end:
                engine.catch_up([sequence])
            else:
                engine.step([sequence])
        pair = tuple(sequence.tokens[len(PROMPT) + 1 : len(PROMPT) + 3])
        counts[pair] = counts.get(pair, 0) + 1
        engine.end(sequence)
    expected = pair_distribution(llama, [*PROMPT, 11], sampling)
    assert set(counts) <= set(expected)
    assert chi_square_tail(counts, expected, draws) > 1e-4
    assert engine.statistics.rollbacks > draws / 10


def pair_distribution(model, ids, sampling):
    from eepass.runtime.sampling import probabilities

    def after(tokens):
        logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[:, -1].float()
        return probabilities(logits, sampling)[0]

    first = after(ids)
    return {
        (a, b): float(first[a] * second[b])
        for a in first.nonzero()[:, 0].tolist()
        for second in [after([*ids, a])]
        for b in second.nonzero()[:, 0].tolist()
    }


def chi_square_tail(counts, expected, draws):
    """Chance of a deviation at least as large (Wilson and Hilferty's normal approximation)."""
    kept = {pair: p for pair, p in expected.items() if p * draws >= 5}
    rest = 1 - sum(kept.values())
    statistic = sum((counts.get(k, 0) - p * draws) ** 2 / (p * draws) for k, p in kept.items())
    if rest * draws >= 5:
        seen = draws - sum(counts.get(pair, 0) for pair in kept)
        statistic += (seen - rest * draws) ** 2 / (rest * draws)
    freedom = len(kept) - (rest * draws < 5)
    scale = 2 / (9 * freedom)
    deviate = ((statistic / freedom) ** (1 / 3) - (1 - scale)) / scale**0.5
    return float(0.5 * torch.erfc(torch.tensor(deviate / 2**0.5)))


def test_the_draft_reads_the_features_of_what_was_accepted(decoder, plain, monkeypatch):
    """They move with the tokens of a path, and those of rejected draft tokens are written over."""
    layers = (1, 3)
    monkeypatch.setattr(RandomDraft, "feature_layers", layers)
    engine, states = engine_for(decoder, plain, 5, "speculation", right=0.7), {}
    sequence = engine.start(PROMPT, 40)
    while not sequence.finished:
        engine.step([sequence])
    gaps, count = engine.statistics.summary()["accepted_per_pass"], sequence.position
    found = sequence.features_at(0, count)
    engine.end(sequence)
    Engine(decoder).prefill(
        sequence.tokens[:count], lambda n, h: states.setdefault(n, []).append(h[0].clone())
    )
    wanted = torch.cat([torch.cat(states[n]) for n in (DEPTH, *layers)], -1)
    assert gaps > 1.2 and not any(found.normed)
    torch.testing.assert_close(found.rows, wanted, atol=2e-5, rtol=1e-4)
