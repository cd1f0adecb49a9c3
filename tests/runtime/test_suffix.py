"""Text drafts: what is proposed stood there, counts are right, rolling back is exact."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eepass.runtime.drafting import suffix
from eepass.runtime.drafting.budget import Budget
from eepass.runtime.drafting.planner import Planner
from eepass.runtime.drafting.suffix import EarlierTexts, SuffixDraft, TextIndex, branches

# few different tokens: texts that repeat themselves
texts = st.lists(st.integers(0, 3), min_size=1, max_size=20)


def budget(most=7):
    return Budget(Planner({1: 1.0, most + 1: 1.01}), most)


def followed(texts, context):
    """By what followed there: for each place, how many of the last tokens of ``context`` match."""
    found = {}
    for text in texts:
        for at in range(1, len(text)):
            matched = 0
            while (
                matched < min(at, len(context)) and text[at - 1 - matched] == context[-1 - matched]
            ):
                matched += 1
            if matched:
                found.setdefault(text[at], []).append(matched)
    return found


@settings(deadline=None)
@given(text=texts, earlier=st.lists(texts, max_size=2))
def test_counts_are_those_of_the_text(text, earlier):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suffix, "PLACES", 1000)
        patch.setattr(suffix, "ENOUGH", 1000)
        check_counts(text, earlier)


def check_counts(text, earlier):
    store = EarlierTexts()
    for one in earlier:
        store.add(one)
    draft = SuffixDraft(store)
    draft.follow(text)
    # an earlier text may also have ended there
    expected = followed([text, *([*one, suffix.END] for one in earlier)], text)
    # one token that matches is too few
    lengths = [length for group in expected.values() for length in group if length > 1]
    found = {branch.token: branch for branch in branches(draft.places())}
    assert len(lengths) <= suffix.PLACES
    for token, group in expected.items():
        group = [length for length in group if length > 1]
        if not group or token == suffix.END:
            assert token not in found
            continue
        branch = found.pop(token)
        assert branch.matched == max(group) and branch.outdone == (max(group) < max(lengths))
        as_far = sum(length >= branch.matched for length in lengths)
        assert branch.share == sum(length >= branch.matched for length in group) / as_far
    assert not found


@settings(deadline=None)
@given(text=texts, earlier=st.lists(texts, max_size=2), most=st.integers(1, 31))
def test_what_is_proposed_stood_after_the_last_tokens(text, earlier, most):
    store = EarlierTexts()
    for one in earlier:
        store.add(one)
    draft = SuffixDraft(store)
    draft.follow(text)
    tree = draft.propose(text[-1], budget(most))
    assert len(tree) <= most + 1
    for node in range(1, len(tree)):
        path = [tree.tokens[n] for n in tree.path(node)]
        # by itself or after the token before: a draft may go on with what was drafted
        pair = [*text, *path][-2:]
        written = [*earlier, [*text, *path[:-1]]]
        assert any(one[at : at + 2] == pair for one in written for at in range(len(one)))


@given(text=texts, more=texts, reach=st.integers(2, 12))
def test_rolling_back_equals_building_anew(text, more, reach):
    index, fresh = TextIndex(64), TextIndex(64)
    index.extend(text)
    index.extend(more)
    index.truncate(len(text))
    fresh.extend(text)
    assert vars(index) == vars(fresh)
    # also where part of the text is not indexed any more
    short, whole = TextIndex(reach), TextIndex(64)
    for one in (short, whole):
        one.extend(text)
        one.extend(more)
        one.truncate(len(text))
        one.extend([1, 2, 1])
    assert short.tokens == whole.tokens
    found, expected = ([place.at for place in one.places([2, 1])] for one in (short, whole))
    assert found == expected[: len(found)]


def test_several_continuations_by_their_counts():
    draft = SuffixDraft()
    draft.follow([9, 5, 6, 7, 1, 8, 5, 6, 7, 2, 4, 5, 6, 7, 1, 3, 5, 6, 7])
    shares = {branch.token: branch.share for branch in branches(draft.places())}
    assert shares == {1: 2 / 3, 2: 1 / 3}
    tree = draft.propose(7, budget(31))
    after = {tree.tokens[node]: tree.chances[node] for node in tree.children(0)}
    assert set(after) == {1, 2} and after[1] > after[2]


def test_a_text_that_repeats_itself_is_drafted_beyond_its_end():
    draft = SuffixDraft()
    draft.follow([1, 2, 3] * 4)
    planner = Planner({1: 1.0, 16: 1.01})
    tree = draft.propose(3, Budget(planner, 15))
    planner.learn(tree, [1, 2, 3] * 5)
    for _ in range(20):
        tree = draft.propose(3, Budget(planner, 15))
        planner.learn(tree, [1, 2, 3] * 5)
    assert tree.tokens == [3, *[1, 2, 3] * 5]


def test_earlier_requests_draft_only_where_they_are_shared():
    store = EarlierTexts()
    store.add([4, 5, 6, 7, 8])
    template = SuffixDraft(store)
    shared, alone = template.fresh(), SuffixDraft()
    for draft in (shared, alone):
        draft.follow([9, 4, 5, 6])
    assert shared.propose(6, budget()).tokens == [6, 7, 8]
    assert alone.propose(6, budget()).tokens == [6]
