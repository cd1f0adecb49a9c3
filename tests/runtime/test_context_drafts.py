"""Passes over selected tokens draft for passes over all, which give the dense answer."""

from dataclasses import replace

import pytest
import torch
from models import VOCABULARY, eager_compile, random_artifact, tiny_model

from eepass.checkpoints.read_torchao import quantize
from eepass.config import ExitConfig
from eepass.long.memory import ContextMemory
from eepass.model import EarlyExitModel, split_model, transform
from eepass.passes.report import PassReport
from eepass.runtime.context.drafts import ContextDrafts
from eepass.runtime.drafting.planner import Planner
from eepass.runtime.sampling import Sampling

CONFIG = ExitConfig(exits=False, speculate="suffix", context_tokens=128)


def text(count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (count,), generator=generator).tolist()


@pytest.fixture(scope="module")
def made(llama):
    splits, _ = split_model(llama, 480, (1, 2, 4, 8, 16))
    artifact = random_artifact(llama)
    return EarlyExitModel(splits, PassReport(), frozenset(), artifact, compiler=eager_compile)


def drafting(made, config=CONFIG, most=6):
    """An engine that drafts up to ``most`` tokens whatever the clock says."""
    engine = made.configure(config)
    engine.context_drafts.pays = lambda waiting, full: waiting < most
    return engine


def generated(engine, ids, count, **options):
    return [step.token for step in engine.generate(ids, count, **options)]


@pytest.mark.parametrize(
    "options", ({}, {"exits": True}, {"speculate": "cascade"}), ids=("text", "exits", "head")
)
@pytest.mark.parametrize("ids", (text(300), text(60) * 5), ids=("random", "repeating"))
def test_the_answer_is_the_dense_one(made, ids, options):
    engine = drafting(made, replace(CONFIG, **options))
    wanted = generated(made.dense, ids, 60)
    assert generated(engine, ids, 60) == wanted
    drafts, statistics = engine.context_drafts, engine.statistics
    # the random model's layers attend to all alike: some of its draft tokens are wrong
    assert 0 < drafts.accepted < drafts.drafted
    assert statistics.tokens >= 59
    assert statistics.rows_caught_up > 0


def test_keys_and_values_are_the_dense_ones(made):
    ids, count = text(300), 40
    tokens = generated(made.dense, ids, count)
    wanted = [layer[:, :, : 300 + count - 1].clone() for layer in made.decoder.kv.values]
    engine = drafting(made)
    assert generated(engine, ids, count) == tokens
    for own, layer in zip(wanted, made.decoder.kv.values, strict=True):
        assert torch.allclose(layer[:, :, : 300 + count - 1], own, atol=1e-5)


def test_what_was_attended_to_most_makes_better_drafts_than_the_latest_tokens(made):
    def share(latest):
        engine = drafting(made)
        drafts = engine.context_drafts
        if latest:
            drafts.selection._choose = lambda layer, text, q, end, n: torch.arange(end - n, end)
        for seed in range(4):
            generated(engine, text(400, seed), 40)
        return drafts.accepted / drafts.drafted

    assert share(latest=False) > share(latest=True)


def test_where_nothing_is_drafted(made):
    engine = drafting(made)
    # a short prompt, and an answer that is drawn
    assert len(generated(engine, text(100), 20)) == 20
    generated(engine, text(300), 20, sampling=Sampling(temperature=1.0, seed=0))
    assert engine.context_drafts.drafted == 0
    for options in ({"context_drafts": False}, {"speculate": "off"}, {"context_tokens": 300}):
        assert made.configure(replace(CONFIG, **options)).context_drafts is None


def test_several_sequences_draft_one_at_a_time(made):
    engine = drafting(made)
    ids = [text(270, seed) for seed in (1, 2)]
    wanted = [generated(made.dense, own, 20)[:12] for own in ids]
    made.decoder.kv.regions.forget()
    first = engine.start(ids[0], 12, capacity=300)
    for _ in range(3):
        engine.step()
    assert engine.context_drafts.drafted > 0 and first.pending
    first_alone = list(first.tokens[: first.num_confirmed])
    assert first_alone == [*ids[0], *wanted[0]][: len(first_alone)]
    while not first.finished:
        engine.advance(first)
    assert first.tokens[270 : first.num_confirmed] == wanted[0]
    engine.reset()


def test_it_drafts_when_that_is_faster():
    """By what passes took: with all keys four times as long."""

    def decided(full_seconds, right, rows=32):
        full = Planner(dict.fromkeys((1, 8, 32), full_seconds))
        drafts = ContextDrafts(None, Planner({1: 1.0}), rows)
        drafts._right = right * drafts._verified
        drafts._drafting.took = 1.0
        return [drafts.pays(waiting, full) for waiting in (0, 2, 6, 15, 16)]

    assert decided(4.0, right=0.95) == [True, True, True, True, False]
    assert decided(1.05, right=0.9) == [False] * 5
    # no more than one pass can verify
    assert decided(4.0, right=0.95, rows=12) == [True, True, False, False, False]
    # the more wait, the less likely the last ones are right
    assert decided(1.5, right=0.9) == [True, True, False, False, False]


def test_bytes_of_a_pass(made):
    memory = ContextMemory.of(made.splits[1])
    layers, groups, width = 4, 2, 16
    assert memory.token == 2 * layers * groups * width * 4
    norms, projections = 2 * 64, 64 * (64 + 2 * 32) + 64 * 64 + 3 * 64 * 96
    assert memory.weights == 4 * (layers * (norms + projections) + 64 + VOCABULARY * 64)
    assert memory.read(1000) == memory.weights + 1000 * memory.token
    assert memory.read(1000, 100) == memory.weights + 100 * memory.token
    assert memory.drafting_pays(10_000, 128) and not memory.drafting_pays(256, 128)


def test_compiled_over_quantised_weights_all_bits_are_the_dense_ones():
    pytest.importorskip("torchao")
    model = tiny_model("llama", intermediate_size=128).bfloat16()
    quantize(model, "int8")
    made = transform(model, random_artifact(model), max_length=448)
    ids, count = text(300), 24
    tokens = generated(made.dense, ids, count)
    layers = [*made.decoder.kv.keys, *made.decoder.kv.values]
    wanted = [layer[:, :, : 300 + count - 1].clone() for layer in layers]
    engine = drafting(made)
    assert generated(engine, ids, count) == tokens
    assert engine.context_drafts.drafted > 0
    for own, layer in zip(wanted, layers, strict=True):
        assert torch.equal(layer[:, :, : 300 + count - 1], own)
    # what is selected decodes over the same weights, too
    lossy = replace(CONFIG, guarantee="approximate", context="selected", speculate="off")
    assert len(generated(made.configure(lossy), ids, count)) == count


def test_where_it_does_not_pay_nothing_is_selected(made):
    engine = made.configure(CONFIG)
    drafts = engine.context_drafts
    drafts.pays = lambda waiting, full: False
    drafts.selection.select = lambda *arguments: pytest.fail("selected in vain")
    assert generated(engine, text(300), 20) == generated(made.dense, text(300), 20)
    assert drafts.drafted == 0
