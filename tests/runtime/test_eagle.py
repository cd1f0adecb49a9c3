"""The draft head at run time: any chunks, any tree, and the same as in training."""

from itertools import count

import pytest
import torch
from models import VOCABULARY, eager_compile

from eepass.runtime.drafting import eagle_head, eagle_layer
from eepass.runtime.drafting.acceptance import EAGLE
from eepass.runtime.drafting.cascade import Cascade
from eepass.runtime.drafting.eagle_tree import EagleTree
from eepass.runtime.drafting.planner import Budget, Planner
from eepass.runtime.drafting.suffix import SuffixDraft
from eepass.training.unrolling import Lines, draft_states, unroll

HIDDEN, LAYERS = 64, (1, 2)
FEATURES = (len(LAYERS) + 1) * HIDDEN


@pytest.fixture(scope="module")
def weights():
    torch.manual_seed(0)
    return {
        name: torch.randn(shape) * (shape[-1] ** -0.5 if len(shape) > 1 else 1)
        for name, shape in eagle_layer.shapes(HIDDEN, 1 + len(LAYERS)).items()
    }


@pytest.fixture(scope="module")
def embedding():
    torch.manual_seed(1)
    return torch.randn(VOCABULARY, HIDDEN)


def made_draft(weights, embedding):
    tensors = {f"eagle.{name}": weight for name, weight in weights.items()}
    tensors["eagle.features"] = torch.tensor(LAYERS)
    tensors["hot.ids"] = torch.arange(0, VOCABULARY, 2)
    tensors["hot.head"] = embedding[tensors["hot.ids"]]
    return eagle_head.EagleHead(tensors, embedding, eager_compile)


@pytest.fixture
def draft(weights, embedding):
    return made_draft(weights, embedding)


def sequence(count, seed=2):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCABULARY, (count,), generator=generator).tolist()
    return tokens, torch.randn(count, FEATURES, generator=generator)


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_one_by_one_equals_the_whole_answer_at_once(draft, weights, embedding):
    tokens, features = sequence(12)
    # training's features stand beside the token they come from
    lines = Lines(torch.tensor([0, *tokens]), torch.cat([features, features[:1]]), torch.arange(13))
    states = draft_states(weights, lines, embedding)
    head = embedding[draft.hot_ids]
    expected = (states[1:] @ head.T).log_softmax(-1)
    assert draft.feature_layers == LAYERS
    for _ in range(2):  # and once more after a reset
        for place in range(12):
            found = draft.extend(tokens[place : place + 1], features[place : place + 1])
            close(found, expected[place])
        assert draft.length == 12
        draft.truncate(0)


@pytest.mark.parametrize("chunks", ([200], [3, 64, 65, 1, 67], [199, 1], [7] * 28 + [4]))
def test_extending_in_any_chunks_is_the_same(draft, weights, embedding, chunks):
    tokens, features = sequence(200)
    one = made_draft(weights, embedding)
    for place in range(200):
        expected = one.extend(tokens[place : place + 1], features[place : place + 1])
    begin = 0
    for size in chunks:
        found = draft.extend(tokens[begin : begin + size], features[begin : begin + size])
        begin += size
    close(found, expected)
    close(draft.grow([5], [-1]), one.grow([5], [-1]))


def test_old_tokens_drop_out_of_a_sequence_longer_than_the_cache(draft, weights, embedding):
    count = 2 * (eagle_head.RING + 40)
    tokens, features = sequence(count)
    other = made_draft(weights, embedding)
    draft.extend(tokens[:-1], features[:-1])
    draft.grow([1], [-1])
    found = draft.extend(tokens[-1:], features[-1:])
    # keys hold no more than one layer saw of the token itself, so the window is all there is
    begin = count - eagle_layer.WINDOW
    other.length = begin
    close(found, other.extend(tokens[begin:], features[begin:]))


@pytest.mark.parametrize("seed", range(3))
def test_a_tree_equals_each_of_its_paths_alone(draft, weights, embedding, seed):
    tokens, features = sequence(20, seed)
    generator = torch.Generator().manual_seed(seed)
    grown, parents, scores = [], [], []
    draft.extend(tokens, features)
    for size in (3, 9, 1, 5):
        above = torch.randint(-1, max(len(grown), 1), (size,), generator=generator)
        above = above.clamp_max(len(grown) - 1).tolist()
        new = torch.randint(0, VOCABULARY, (size,), generator=generator).tolist()
        scores += draft.grow(new, above).unbind()
        grown, parents = grown + new, parents + above
    chain = made_draft(weights, embedding)
    for leaf in range(len(grown)):
        path = [leaf]
        while parents[path[0]] >= 0:
            path.insert(0, parents[path[0]])
        chain.extend(tokens, features)
        for depth, draft_row in enumerate(path):
            found = chain.grow([grown[draft_row]], [depth - 1])
            close(found[0], scores[draft_row])
        chain.truncate(0)


def test_training_unrolls_what_the_runtime_grows(draft, weights, embedding):
    tokens, features = sequence(16)
    steps = unroll(torch.tensor([tokens]), features[None], embedding, weights, 4)
    head = embedding[draft.hot_ids]
    for confirmed in (1, 5, 12):
        draft.extend(tokens[:confirmed], features[:confirmed])
        for step in range(1, 4):
            row = confirmed + step - 1
            found = draft.grow([tokens[row]], [step - 2])[0]
            close(found, (steps[step][0, row] @ head.T).log_softmax(-1))
        draft.truncate(0)


def test_a_draft_follows_its_own_parent(draft):
    tokens, features = sequence(20)
    draft.extend(tokens, features)
    draft.grow([1, 2], [-1, -1])
    after = draft.grow([3, 3], [0, 1])
    assert (after[0] - after[1]).abs().max() > 1e-2


@pytest.mark.parametrize(("kept", "total"), ((10, 30), (0, 5), (600, 700), (30, 30)))
def test_truncated_and_extended_equals_fresh(draft, weights, embedding, kept, total):
    tokens, features = sequence(total)
    other_tokens, other_features = sequence(40, seed=9)
    draft.extend(tokens, features)
    draft.grow([1, 2], [-1, -1])
    draft.truncate(kept)
    assert draft.length == kept
    found = draft.extend(other_tokens, other_features)
    fresh = made_draft(weights, embedding)
    both = [*tokens[:kept], *other_tokens], torch.cat([features[:kept], other_features])
    if total > eagle_head.RING:
        # what was pushed out of the ring does not come back
        first = total - eagle_head.RING
        fresh.length = first
        both = both[0][first:], both[1][first:]
    close(found, fresh.extend(*both))
    close(draft.grow([7, 8], [-1, -1]), fresh.grow([7, 8], [-1, -1]))


def test_misuse_is_refused(draft):
    tokens, features = sequence(4)
    with pytest.raises(ValueError, match="extend first"):
        draft.grow([1], [-1])
    draft.extend(tokens, features)
    with pytest.raises(ValueError, match="parents"):
        draft.grow([1, 2], [-1, 0])
    with pytest.raises(ValueError, match="room"):
        draft.grow([1] * 64, [-1] * 64)
    with pytest.raises(ValueError, match="length"):
        draft.truncate(5)
    draft.truncate(3)
    with pytest.raises(ValueError, match="extend first"):
        draft.grow([1], [-1])


def test_text_and_the_head_make_one_tree(weights, embedding):
    draft = Cascade(EagleTree(made_draft(weights, embedding)), SuffixDraft())
    _, features = sequence(9)
    draft.follow([5, 6, 7, 8, 9, 11, 5, 6, 7], features)
    budget = Budget(Planner({1: 1.0, 8: 1.01}, draft_tokens=3.0), 7)
    tree = draft.propose(7, budget)
    after_root = {tree.tokens[node] for node in tree.children(0)}
    best = draft.head.first().topk(2).indices
    assert {8, *draft.head.head.hot_ids[best].tolist()} <= after_root
    # the text alone goes on along its own line
    paths = [[tree.tokens[n] for n in tree.path(node)] for node in range(len(tree))]
    assert [8, 9, 11, 5] in paths


def test_the_head_does_not_run_where_it_gains_less_than_it_takes(weights, embedding, monkeypatch):
    calls, ticks = [], count()

    def add_wrong(self, tree, budget):
        calls.append(tree.add(3, 0, budget.chance((EAGLE, 0), 0.3), (EAGLE, 0)))

    monkeypatch.setattr(EagleTree, "add_to", add_wrong)
    draft = Cascade(EagleTree(made_draft(weights, embedding)), SuffixDraft())
    _, features = sequence(9)
    draft.follow([5, 6, 7, 8, 9, 11, 5, 6, 7], features)
    # a clock that is looked at before and after each call
    planner = Planner(
        {1: 1.0, 8: 1.01}, 0.1, 3.0, ("dense", "speculation"), clock=lambda: 0.1 * next(ticks)
    )
    for _ in range(50):
        # what the text says is right, what the head says never is
        planner.mode()
        tree = draft.propose(7, Budget(planner, 7))
        planner.learn(tree, [8, 9, 11, 5, 6, 7, 8])
        planner.record("speculation", 8, 1.01, 7, 7)
    assert 0 < len(calls) < 20 and len(tree) > 4
    # where it is right it runs, and the text goes on from what it says
    for _ in range(50):
        planner.mode()
        tree = draft.propose(7, Budget(planner, 7))
        planner.learn(tree, [3])
        planner.record("speculation", 8, 1.01, 7, 7)
    assert len(calls) > 30
