"""The draft head at run time: any chunks, whole trees, and the same as in training."""

from functools import partial
from itertools import count

import pytest
import torch
import torch.nn.functional as F
from made_heads import reader
from models import VOCABULARY, eager_compile

from eepass.runtime.drafting import eagle_form, eagle_head, eagle_layer, eagle_steps
from eepass.runtime.drafting.acceptance import EAGLE
from eepass.runtime.drafting.budget import Budget
from eepass.runtime.drafting.cascade import Cascade
from eepass.runtime.drafting.eagle_tree import EagleTree
from eepass.runtime.drafting.eagle_weights import packed_matrices
from eepass.runtime.drafting.planner import Planner
from eepass.runtime.drafting.suffix import SuffixDraft
from eepass.runtime.drafting.tree import Tree
from eepass.segments import GraphToMake
from eepass.training.unrolling import unroll

HIDDEN, LAYERS = 64, (1, 2)
FEATURES = (len(LAYERS) + 1) * HIDDEN
ROTARY = 10000.0 ** -(torch.arange(0, 16, 2) / 16)
MADE = {}
STYLE = eagle_layer.HeadStyle(HIDDEN, 4, 2, ROTARY, 128, 1 + len(LAYERS))


def norm(hidden):
    return hidden


@pytest.fixture(scope="module")
def weights():
    torch.manual_seed(0)
    made = {
        name: torch.randn(shape) * shape[-1] ** -0.5 if len(shape) > 1 else torch.rand(shape) + 0.5
        for name, shape in STYLE.shapes().items()
    }
    return {**made, "rotary": ROTARY}


@pytest.fixture(scope="module")
def embedding():
    torch.manual_seed(1)
    return torch.randn(VOCABULARY, HIDDEN) / 4


def made_draft(weights, embedding, bits=None):
    tensors = {f"eagle.{name}": weight for name, weight in weights.items()}
    tensors["eagle.features"] = torch.tensor(LAYERS)
    tensors["eagle.hot.ids"] = torch.arange(0, VOCABULARY, 2)
    tensors["eagle.hot.head"] = embedding[tensors["eagle.hot.ids"]]
    return eagle_head.EagleHead(tensors, embedding, compile_once, bits=lambda: bits)


def compile_once(graph, structure, examples, *, logits):
    """Traced once for all heads, as compilers do it."""
    if structure not in MADE:
        MADE[structure] = eager_compile(GraphToMake.made(graph), structure, examples)
    return MADE[structure]


@pytest.fixture
def draft(weights, embedding):
    return made_draft(weights, embedding)


def sequence(count, seed=2):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCABULARY, (count,), generator=generator).tolist()
    return tokens, torch.randn(count, FEATURES, generator=generator)


def close(found, expected, tolerance=1e-4):
    for one, other in zip(found, expected, strict=True):
        assert one.above == other.above and one.tokens == other.tokens
        wanted = torch.tensor(other.scores)
        torch.testing.assert_close(torch.tensor(one.scores), wanted, atol=tolerance, rtol=tolerance)


def begun(head, tokens, features):
    """The first levels after ``tokens``, without a change to the head."""
    length = head.length
    levels = head.begin(tokens, features)
    head.truncate(length)
    return levels


@pytest.mark.parametrize("chunks", ([200], [3, 64, 65, 1, 67], [199, 1], [7] * 28 + [4]))
def test_extending_in_any_chunks_is_the_same(draft, weights, embedding, chunks):
    tokens, features = sequence(200)
    one = made_draft(weights, embedding)
    for place in range(199):
        one.extend(tokens[place : place + 1], features[place : place + 1])
    expected = [*one.begin(tokens[199:], features[199:]), *one.further()]
    begin = 0
    for size in chunks[:-1]:
        draft.extend(tokens[begin : begin + size], features[begin : begin + size])
        begin += size
    close([*draft.begin(tokens[begin:], features[begin:]), *draft.further()], expected)


def test_old_tokens_drop_out_of_a_sequence_longer_than_the_cache(draft, weights, embedding):
    count = 2 * (eagle_steps.RING + 40)
    tokens, features = sequence(count)
    draft.extend(tokens[:-1], features[:-1])
    found = begun(draft, tokens[-1:], features[-1:])
    # keys hold no more than one layer saw of the token itself, so the window is all there is
    other = made_draft(weights, embedding)
    other.length = begin = count - eagle_form.WINDOW
    close(found, other.begin(tokens[begin:], features[begin:]))


@pytest.mark.parametrize("confirmed", (1, 5, 12, 30))
def test_a_tree_in_one_call_is_what_training_unrolls(draft, weights, embedding, confirmed):
    """Of every path by itself, and each level has the likeliest tokens after its paths."""
    tokens, features = sequence(confirmed)
    levels = [*draft.begin(tokens, features), *draft.further(), *draft.further()]
    assert len(levels) == draft.levels == 6
    head, paths = embedding[draft.hot_ids], [([], 0.0)]
    for level in levels:
        width = len(level.tokens) // len(level.above)
        named = []
        for place, above in enumerate(level.above):
            path, joint = paths[above]
            text = torch.tensor([[*tokens, *path]])
            given = torch.cat([features, torch.zeros(len(path), FEATURES)])[None]
            steps = unroll(text, given, embedding, weights, len(path) + 1)
            scores = (steps[-1][0, -1] @ head.T).log_softmax(-1)
            best = scores.topk(width)
            own = slice(place * width, (place + 1) * width)
            assert level.tokens[own] == draft.hot_ids[best.indices].tolist()
            torch.testing.assert_close(
                torch.tensor(level.scores[own]), best.values, atol=1e-4, rtol=1e-4
            )
            named += [
                ([*path, t], joint + s) for t, s in zip(level.tokens[own], best.values, strict=True)
            ]
        # the next level's rows are the likeliest paths
        order = sorted(range(len(named)), key=lambda n: -float(named[n][1]))
        following = levels.index(level) + 1
        picked = levels[following].above if following < len(levels) else draft.frontier
        assert sorted(picked) == sorted(order[: eagle_steps.BEAM])
        paths = named


def plain_head(tokens, features, embedding, weights, form):
    """Logits [N] after a text, from EAGLE-3's equations one position after another; the features of
    draft tokens are None."""

    def norm(x, name=None):
        made = x * (x.pow(2).mean() + form.epsilon).rsqrt()
        return made if name is None else made * weights[name]

    def rotated(x, position):
        angle = (position * ROTARY).repeat(2)
        first, second = x.chunk(2, -1)
        return x * angle.cos() + torch.cat([-second, first], -1) * angle.sin()

    keys, values, state = [], [], None
    for position, (token, given) in enumerate(zip(tokens, features, strict=True)):
        feature = state
        if given is not None:
            parts = list(given.split(HIDDEN))[0 if form.reads_z else 1 :]
            if form.fc_norm == "each":
                raw = range(len(parts))[1 if form.reads_z else 0 :]
                parts = [norm(x) if place in raw else x for place, x in enumerate(parts)]
            joined = torch.cat(parts)
            if form.fc_norm == "each":
                joined = joined * weights["fc_norm"]
            if form.fc_norm == "together":
                joined = norm(joined, "input_norm")
            feature = weights["fc"] @ joined
        hidden = norm(feature, "hidden_norm")
        own = weights.get("embedding", embedding)[token]
        x = torch.cat([norm(own, "token_norm"), hidden])
        q = rotated((weights["q"] @ x).view(4, -1), position)
        keys.append(rotated((weights["k"] @ x).view(2, -1), position))
        values.append((weights["v"] @ x).view(2, -1))
        seen = []
        for head, query in enumerate(q):
            scores = torch.stack([key[head // 2] @ query for key in keys]) * 16**-0.5
            shares = scores.softmax(0)
            seen.append(sum(s * v[head // 2] for s, v in zip(shares, values, strict=True)))
        residual = hidden if form.norm_before_residual else feature
        middle = residual + weights["o"] @ torch.cat(seen)
        x = norm(middle, "mlp_norm")
        state = middle + weights["down"] @ (F.silu(weights["gate"] @ x) * (weights["up"] @ x))
        normed = norm(state, "norm")
        state = normed if form.norm_output else state
    return weights["hot.head"] @ normed


FORMS = {
    "trained here": {},
    "EAGLE-3": {"reads_z": False, "norm_before_residual": False, "norm_output": False,
                "fc_norm": None, "epsilon": 1e-2},
    "speculators": {"reads_z": False, "norm_output": False, "fc_norm": None},
    "EAGLE-3.1": {"reads_z": False, "norm_before_residual": False},
    "normed together": {"reads_z": False, "norm_output": False, "fc_norm": "together"},
    "an embedding and a head of its own": {"embedding": True, "norm_before_residual": False},
}  # fmt: skip


def formed(weights, embedding, changes):
    """A head of another form with weights like ``weights``."""
    made = {**weights, "features": torch.tensor(LAYERS), "hot.ids": torch.arange(0, VOCABULARY, 2)}
    made["hot.head"] = embedding[made["hot.ids"]]
    for name, value in changes.items():
        if name == "embedding":
            torch.manual_seed(5)
            made["embedding"] = torch.randn(embedding.shape)
            made["hot.head"] = torch.randn(made["hot.head"].shape) / 4
        elif name != "fc_norm":
            made[name] = torch.tensor([value])
    if not changes.get("reads_z", True):
        made["fc"], made["fc_norm"] = made["fc"][:, HIDDEN:], made["fc_norm"][HIDDEN:]
    if "fc_norm" in changes:
        own = made.pop("fc_norm")
        if changes["fc_norm"] == "together":
            made["input_norm"] = own
    return made


@pytest.mark.parametrize("name", FORMS)
def test_heads_of_every_form_are_run_as_their_equations_say(weights, embedding, name):
    made = formed(weights, embedding, FORMS[name])
    form = eagle_form.form_of(made)
    assert form.trained_here == (not FORMS[name])
    tensors = {f"eagle.{n}": t for n, t in made.items()}
    head = eagle_head.EagleHead(tensors, embedding, compile_once)
    tokens, features = sequence(6)
    # as training runs it
    (state,) = unroll(torch.tensor([tokens]), features[None], embedding, made, 1)
    logits = plain_head(tokens, features, embedding, made, form)
    torch.testing.assert_close(made["hot.head"] @ state[0, -1], logits, atol=1e-4, rtol=1e-4)
    levels = head.begin(tokens, features)
    path, text, given = [], list(tokens), list(features)
    for level in levels:
        # the likeliest token after the path so far, whose row is the first that was expanded
        logits = plain_head(text, given, embedding, made, form)
        scores = logits.log_softmax(-1)
        best = scores.topk(len(level.tokens) // len(level.above))
        rows = [place for place, above in enumerate(level.above) if above == (path or [0])[-1]]
        width = len(best.values)
        own = slice(rows[0] * width, (rows[0] + 1) * width)
        assert level.tokens[own] == made["hot.ids"][best.indices].tolist()
        torch.testing.assert_close(
            torch.tensor(level.scores[own]), best.values, atol=1e-4, rtol=1e-4
        )
        following = levels[levels.index(level) + 1 :]
        picked = following[0].above if following else head.frontier
        # any of those that go on
        path.append(next(place for place in picked if own.start <= place < own.stop))
        text.append(level.tokens[path[-1]])
        given.append(None)


def test_a_tree_has_room_for_so_many_levels(draft):
    draft.begin(*sequence(3))
    grown = 0
    while levels := draft.further():
        grown += len(levels)
    assert grown * eagle_steps.BEAM <= eagle_steps.SPARE
    assert draft.begin(*sequence(3)) and draft.further()


@pytest.mark.parametrize(("kept", "total"), ((10, 30), (0, 5), (600, 700), (30, 30)))
def test_truncated_and_extended_equals_fresh(draft, weights, embedding, kept, total):
    tokens, features = sequence(total)
    other_tokens, other_features = sequence(40, seed=9)
    draft.begin(tokens, features)
    draft.truncate(kept)
    assert draft.length == kept
    found = draft.begin(other_tokens, other_features)
    fresh = made_draft(weights, embedding)
    both = [*tokens[:kept], *other_tokens], torch.cat([features[:kept], other_features])
    if total > eagle_steps.RING:
        # what was pushed out of the ring does not come back
        first = total - eagle_steps.RING
        fresh.length = first
        both = both[0][first:], both[1][first:]
    close(found, fresh.begin(*both))
    close(draft.further(), fresh.further())


def test_two_sequences_of_one_head_do_not_meet(draft):
    tokens, features = sequence(9)
    expected = begun(draft, tokens, features)
    other = draft.fresh()
    other.begin(*sequence(20, seed=5))
    close(begun(draft, tokens, features), expected)


@pytest.mark.parametrize(("bits", "tolerance"), ((8, 0.1), (4, 1.0)))
def test_a_head_of_few_bits_says_nearly_the_same(draft, weights, embedding, bits, tolerance):
    few = made_draft(weights, embedding, bits)
    stored, plain = (
        sum(x.nbytes for x in head._weights.packed[0][: len(head._weights.matrices)])
        for head in (few, draft)
    )
    assert stored < plain * (bits + 3) / 32
    tokens, features = sequence(20)
    exact, rounded = (head.begin(tokens, features, 1)[0] for head in (draft, few))
    said = dict(zip(exact.tokens, exact.scores, strict=True))
    given = zip(rounded.tokens, rounded.scores, strict=True)
    differences = [abs(said[token] - score) for token, score in given if token in said]
    assert len(differences) >= 4 and max(differences) < tolerance


def test_a_matrix_without_groups_stays_as_it_is():
    weight = torch.randn(8, 40)
    stored, matrix = packed_matrices([weight], 4)
    assert torch.equal(stored, weight) and matrix.form is None


def test_misuse_is_refused(draft):
    tokens, features = sequence(4)
    with pytest.raises(ValueError, match="begin first"):
        draft.further()
    with pytest.raises(ValueError, match="nothing to grow"):
        draft.begin([], features[:0])
    draft.begin(tokens, features)
    with pytest.raises(ValueError, match="length"):
        draft.truncate(5)
    draft.truncate(3)
    with pytest.raises(ValueError, match="begin first"):
        draft.further()


def test_the_last_token_is_run_again_for_another_tree(weights, embedding):
    draft = EagleTree(made_draft(weights, embedding), norm)
    tokens, features = sequence(9)
    draft.follow(tokens)
    read = reader(features)
    named = draft.candidates(4, read).tolist()
    budget = Budget(Planner({1: 1.0, 8: 1.01}), 7)
    first, second = draft.propose(7, budget, read), draft.propose(7, budget, read)
    assert first.tokens == second.tokens and first.parents == second.parents
    assert {first.tokens[n] for n in first.children(0)} >= set(named)


def test_text_and_the_head_make_one_tree(weights, embedding):
    draft = Cascade(EagleTree(made_draft(weights, embedding), norm), SuffixDraft())
    _, features = sequence(9)
    draft.follow([5, 6, 7, 8, 9, 11, 5, 6, 7])
    read = reader(features)
    budget = Budget(Planner({1: 1.0, 8: 1.01}, draft_tokens=3.0), 7)
    tree = draft.propose(7, budget, read)
    after_root = {tree.tokens[node] for node in tree.children(0)}
    assert {8, *draft.head.candidates(2, read).tolist()} <= after_root
    # the text alone goes on along its own line
    paths = [[tree.tokens[n] for n in tree.path(node)] for node in range(len(tree))]
    assert [8, 9, 11, 5] in paths


def test_the_head_does_not_run_where_it_gains_less_than_it_takes(weights, embedding, monkeypatch):
    calls, ticks = [], count()

    def add_wrong(self, tree, budget, read):
        calls.append(tree.add(3, 0, budget.chance((EAGLE, 0), 0.3), (EAGLE, 0)))

    monkeypatch.setattr(EagleTree, "add_to", add_wrong)
    draft = Cascade(EagleTree(made_draft(weights, embedding), norm), SuffixDraft())
    _, features = sequence(9)
    draft.follow([5, 6, 7, 8, 9, 11, 5, 6, 7])
    read = reader(features)
    # a clock that is looked at before and after each call
    planner = Planner(
        {1: 1.0, 8: 1.01}, 0.1, 3.0, ("dense", "speculation"), clock=lambda: 0.1 * next(ticks)
    )
    for _ in range(50):
        # what the text says is right, what the head says never is
        planner.mode()
        tree = draft.propose(7, Budget(planner, 7), read)
        planner.learn(tree, [8, 9, 11, 5, 6, 7, 8])
        planner.record("speculation", 8, 1.01, 7, 7)
    assert 0 < len(calls) < 20 and len(tree) > 4
    # where it is right it runs again, in the end in each pass
    for number in range(240):
        if number == 200:
            calls.clear()
        planner.mode()
        tree = draft.propose(7, Budget(planner, 7), read)
        planner.learn(tree, [3])
        planner.record("speculation", 8, 1.01, 7, 7)
    assert len(calls) > 30


def test_what_the_head_is_behind_with_is_no_cost_of_a_tree(weights, embedding):
    """It catches up with a prompt: what each later tree costs is the rest."""
    draft = EagleTree(made_draft(weights, embedding), norm)
    tokens, features = sequence(60)
    planner = Planner({1: 1.0, 8: 1.01}, draft_tokens=3.0, clock=count(0.0, 0.1).__next__)
    read, behind = reader(features), []
    for begin, end in ((0, 40), (40, 42), (42, 60)):
        draft.follow(tokens[begin:end])
        budget = Budget(planner, 7)
        assert budget.ask(Tree([7]), partial(draft.add_to, read=read))
        behind.append(round(budget.behind, 6))
        assert draft.head.length == end
    # later it leaves them out
    assert behind == [0.1, 0, 0]
    wanted = made_draft(weights, embedding)
    features[0] = 0
    wanted.extend(tokens[:42], features[:42])
    wanted.skip(10)
    close(wanted.begin(tokens[52:], features[52:]), draft._begin(read))
