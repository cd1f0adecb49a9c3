"""Features of the draft head: kept by slot, read when a draft is asked for, moved with tokens."""

import torch
from models import random_artifact, tiny_model

import eepass
from eepass.config import ExitConfig
from eepass.runtime.cache.feature_cache import FeatureCache
from eepass.runtime.drafting.eagle_tree import EagleTree
from eepass.runtime.drafting.features import Features, before


def test_only_what_is_not_normed_is():
    rows = torch.arange(12.0).reshape(3, 4)
    seen = []

    def norm(hidden):
        seen.append(hidden.clone())
        return -hidden

    assert Features(rows[:1], [True]).value(2, norm) is not None and not seen
    found = Features(rows, [True, False, True]).value(2, norm)
    assert torch.equal(found, torch.tensor([[0, 1, 2, 3], [-4, -5, 6, 7], [8, 9, 10, 11.0]]))
    assert len(seen) == 1 and torch.equal(seen[0], rows[None, 1:2, :2])
    # what was given is as it was
    assert torch.equal(rows, torch.arange(12.0).reshape(3, 4))
    assert torch.equal(Features(rows, [False] * 3).value(2, norm)[:, :2], -rows[:, :2])


def test_the_first_token_has_none_before_it():
    rows = torch.arange(1.0, 9).reshape(4, 2)

    def read(position, count):
        assert position >= 0 and position + count <= 4
        return Features(rows[position : position + count], [False] * count)

    found = before(0, 3, read)
    assert found.rows.tolist() == [[0, 0], [1, 2], [3, 4]]
    assert found.normed == [True, False, False]
    assert before(0, 1, read).rows.tolist() == [[0, 0]]
    assert before(3, 2, read).rows.tolist() == [[5, 6], [7, 8]]


def filled(*values):
    """A cache of 20 slots whose tokens from slot 2 on have ``values`` as z, and 10 times that after
    layer 3."""
    cache = FeatureCache(20, (3,))
    cache.copy(0, 5, 3)
    z = torch.tensor([*values, 99], dtype=torch.float)[None, :, None]
    cache.begin(range(2, 2 + len(values)))
    cache.keep(3, 10 * z)
    cache.keep(None, z)
    return cache


def test_features_move_with_their_slots():
    cache = filled(1, 2, 3)
    cache.decided(3, torch.tensor([7.0]))
    cache.copy(2, 3, 3)
    found = cache.read(3, 3)
    assert found.rows.tolist() == [[1, 10], [7, 20], [3, 30]]
    assert found.normed == [False, True, False]
    cache.begin([3, 4])
    cache.begin([5])
    assert cache.read(3, 3).normed == [False] * 3 and found.normed == [False, True, False]


def test_what_is_accepted_closes_the_gaps():
    cache = filled(1, 2, 3, 4, 5)
    cache.decided(4, torch.tensor([7.0]))
    cache.move([2, 4, 6], 2)
    found = cache.read(2, 3)
    assert found.rows.tolist() == [[1, 10], [7, 30], [5, 50]]
    assert found.normed == [False, True, False]


def test_an_exit_leaves_what_it_knows():
    cache = FeatureCache(8, (1, 3))
    assert cache.between(0, 2) == [1] and cache.between(1, 4) == [3]
    slots = torch.tensor([4, 5])
    cache.begin([4, 5])
    cache.keep(1, torch.tensor([[[1.0], [2.0]]]))
    cache.decided(4, torch.tensor([9.0]))
    # read in the middle of a pass, which goes on
    assert cache.read(4, 2).rows[:, :2].tolist() == [[9, 1], [0, 2]]
    # its state after layer 1 stands for that after layer 3
    cache.exited([4], 2)
    cache.write(3, slots[1:], torch.tensor([[20.0]]))
    cache.write(None, slots[1:], torch.tensor([[200.0]]))
    assert cache.read(4, 2).rows.tolist() == [[9, 1, 1], [200, 2, 20]]
    # one decided within a tree whose other rows went on keeps its z
    cache.write(None, slots, torch.tensor([[5.0], [6.0]]), exited=True)
    assert cache.read(4, 2).rows[:, 0].tolist() == [9, 6]


def test_the_newest_pass_over_a_slot_counts():
    """Draft tokens that were rejected leave their slots to others; little waits to be written."""
    cache = FeatureCache(200)
    for begin in range(100):
        cache.begin([begin, begin + 1, begin + 2])
        cache.keep(None, torch.tensor([[[begin + 0.0], [-1], [-2], [-3]]]))
        assert len(cache._waiting) <= 64
    found = cache.read(0, 102).rows[:, 0].tolist()
    assert found == [*range(100), -1, -2]


def test_tokens_that_nothing_is_drafted_after_are_not_normed(monkeypatch):
    model = tiny_model("llama")
    transformed = eepass.transform(model, random_artifact(model), max_length=128)
    engine = transformed.configure(ExitConfig(exits=False, speculate="eagle", adaptive=False))
    normed: list[int] = []
    begin = EagleTree._begin

    def counted(self, read, **how):
        tree = begin(self, read, **how)
        normed.append(sum(calls))
        calls.clear()
        return tree

    calls = []
    norm = engine.draft.head.norm

    def counting(hidden):
        calls.append(hidden.shape[1])
        return norm(hidden)

    engine.draft.head.norm = counting
    engine.measure()
    calls.clear()
    monkeypatch.setattr(EagleTree, "_begin", counted)
    list(engine.generate(list(range(3, 33)), 8))
    # the prompt's, when the first tree is grown, and then those of each pass
    assert normed[0] >= 30 and all(1 <= count <= 16 for count in normed[1:])
    normed.clear()
    engine.options = type(engine.options)("exact", modes=("dense",))
    engine.planner.modes = ("dense",)
    list(engine.generate(list(range(3, 33)), 8))
    assert not normed and not calls
