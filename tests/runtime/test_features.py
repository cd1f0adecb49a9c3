"""Features of the draft head: normed when they are needed, kept by slot, moved with tokens."""

import torch
from models import random_artifact, tiny_model

import eepass
from eepass.config import ExitConfig
from eepass.runtime.cache.feature_cache import FeatureCache
from eepass.runtime.drafting.eagle_tree import EagleTree
from eepass.runtime.drafting.features import Features, joined


def test_only_what_is_not_normed_is():
    rows = torch.arange(12.0).reshape(3, 4)
    seen = []

    def norm(hidden):
        seen.append(hidden.clone())
        return -hidden

    features = joined([Features.of(rows[:1]), Features(rows[1:], [False, True])])
    assert features.between(0, 1).value(2, norm) is not None and not seen
    found = features.value(2, norm)
    assert torch.equal(found, torch.tensor([[0, 1, 2, 3], [-4, -5, 6, 7], [8, 9, 10, 11.0]]))
    assert len(seen) == 1 and torch.equal(seen[0], rows[None, 1:2, :2])
    # what was given is as it was
    assert torch.equal(features.rows, rows)


def test_features_move_with_their_slots():
    cache = FeatureCache(20)
    cache.copy(0, 5, 3)
    cache.write(2, Features(torch.ones(3, 4), [False, True, False]))
    cache.copy(2, 3, 3)
    found = cache.read(3, 3)
    assert found.rows.sum() == 12 and found.normed == [False, True, False]
    cache.write(3, Features.of(torch.zeros(3, 4)))
    assert found.rows.sum() == 12


def test_tokens_that_nothing_is_drafted_after_are_not_normed(monkeypatch):
    model = tiny_model("llama")
    transformed = eepass.transform(model, random_artifact(model), max_length=128)
    engine = transformed.configure(ExitConfig(exits=False, speculate="eagle", adaptive=False))
    normed: list[int] = []
    begin = EagleTree._begin

    def counted(self, **how):
        tree = begin(self, **how)
        normed.append(sum(calls))
        calls.clear()
        return tree

    calls = []
    norm = engine.draft.head.norm

    def counting(hidden):
        calls.append(hidden.shape[1])
        return norm(hidden)

    engine.draft.head.norm = counting
    monkeypatch.setattr(EagleTree, "_begin", counted)
    list(engine.generate(list(range(3, 33)), 8))
    # the prompt's, when the first tree is grown, and then those of each pass
    assert normed[0] == 30 and all(1 <= count <= 16 for count in normed[1:])
    normed.clear()
    engine.options = type(engine.options)("exact", modes=("dense",))
    engine.planner.modes = ("dense",)
    list(engine.generate(list(range(3, 33)), 8))
    assert not normed and not calls
