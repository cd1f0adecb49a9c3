"""Sources of draft tokens: what they propose, that they roll back, that answers stay dense ones."""

import pytest
from models import eager_compile, tiny_model
from plain import PlainEngine

from eepass.passes.pipeline import split_for_rows
from eepass.runtime.decoder.decoder import Decoder
from eepass.runtime.drafting.budget import Budget
from eepass.runtime.drafting.model_draft import ModelDraft
from eepass.runtime.drafting.planner import Planner
from eepass.runtime.drafting.suffix import SuffixDraft
from eepass.runtime.drafting.tree import Tree
from eepass.runtime.engine.engine import Engine
from eepass.runtime.engine.options import Options

PROMPT = [63, 80, 29, 104, 125]
SPECULATION = Options("exact", modes=("speculation",))


def budget(most=7, **costs):
    return Budget(Planner({1: 1.0, 8: 1.01}, **costs), most)


def test_look_up_proposes_what_followed_before():
    draft = SuffixDraft()
    draft.follow([5, 6, 7, 8, 9, 10, 5, 6, 7])
    tree = draft.propose(7, budget())
    assert tree.tokens[:4] == [7, 8, 9, 10]
    assert tree.parents[:4] == [-1, 0, 1, 2]


def test_rolled_back_tokens_are_not_proposed():
    draft = SuffixDraft()
    draft.follow([5, 6, 7, 8])
    draft.follow([5, 6])
    draft.truncate(2)
    draft.follow([9, 5, 6])
    assert draft.propose(6, budget()).tokens[:2] == [6, 9]


def test_chances_are_learned():
    planner = Planner({1: 1.0, 8: 1.01})
    shared = Budget(planner, 7)
    before = shared.chance((1, 1), 0.5)
    tree = Tree([5])
    tree.add(6, 0, 0.5, (1, 1))
    for _ in range(50):
        planner.learn(tree, [6])
    assert shared.chance((1, 1), 0.5) > 0.8 > before
    for _ in range(100):
        planner.learn(tree, [7])
    assert shared.chance((1, 1), 0.5) < before


@pytest.fixture(scope="module")
def plain(llama):
    return PlainEngine(llama)


def test_a_small_model_drafts(llama_splits, plain):
    """The model as its own draft: all its draft tokens are accepted."""
    decoder = Decoder(llama_splits, eager_compile)
    other = Decoder(llama_splits, eager_compile)
    engine = Engine(decoder, draft=ModelDraft(other), options=SPECULATION)
    generated = [step.token for step in engine.generate(PROMPT, 40)]
    assert generated == plain.answer(PROMPT, 40)
    assert engine.statistics.summary()["accepted_per_pass"] > 3


def test_a_small_model_that_is_wrong_costs_only_time(llama_splits, plain):
    decoder = Decoder(llama_splits, eager_compile)
    small = split_for_rows(tiny_model("llama", num_hidden_layers=2), 128, (1, 4, 8), 16)[0]
    engine = Engine(decoder, draft=ModelDraft(Decoder(small, eager_compile)), options=SPECULATION)
    assert [step.token for step in engine.generate(PROMPT, 40)] == plain.answer(PROMPT, 40)


def test_look_up_drafts_for_the_small_model(llama_splits):
    """Text that comes again takes fewer passes of the small model than tokens."""
    small = Decoder(llama_splits, eager_compile)
    passes = []
    original = small.logits
    small.logits = lambda hidden: passes.append(1) or original(hidden)
    draft = ModelDraft(small)
    generated = [step.token for step in Engine(small).generate(PROMPT, 40)]
    passes.clear()
    draft.follow([*PROMPT, *generated[:-6]])
    tree = draft.propose(generated[-7], budget(most=6))
    # its own greedy answer goes on; part of it stood in the text before
    assert tree.tokens[1:] == generated[-6:][: len(tree) - 1] and len(tree) > 3
    assert len(passes) < len(tree) - 1


def test_a_tree_keeps_the_likeliest_and_its_parents():
    tree = Tree([1])
    a = tree.add(2, 0, 0.6, None)
    b = tree.add(3, 0, 0.3, None)
    c = tree.add(4, b, 0.9, None)
    assert tree.add(2, 0, 0.7, None) == a and tree.chances[a] == 0.7
    kept = Planner({1: 1.0, 4: 1.1}).choose(tree, 7)
    assert kept.tokens == [1, 2, 3, 4] and [kept.tokens[n] for n in kept.path(3)] == [3, 4]
    assert len(Planner({1: 1.0, 4: 1.1}).choose(tree, 2)) == 3
    # rows that cost as much as passes are not worth it
    assert len(Planner({1: 1.0, 4: 3.0}).choose(tree, 7)) == 1
    assert tree.path(c) == [b, c]


def test_passes_that_bring_nothing_are_no_reason_to_stop():
    planner = Planner({1: 1.0, 4: 1.1}, modes=("dense", "exits"))
    for grown in (1, 0, 0, -3, 0, 0):
        planner.mode()
        planner.record("exits", 1, 1.0, 1, grown)
    # exits that are rolled back each time do not pay
    assert planner.decision()["mode"] == "dense"
