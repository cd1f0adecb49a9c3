"""Text drafts as vLLM asks for them: arrays of all rows, and no word on whose they are."""

from types import SimpleNamespace

import numpy as np
import pytest

from eepass.drafts.vllm_suffix import SharedSuffixDrafts, SuffixDrafts
from eepass.errors import InputError

ROWS, LONGEST = 4, 64


def config(most=4, longest=LONGEST):
    return SimpleNamespace(
        speculative_config=SimpleNamespace(num_speculative_tokens=most),
        model_config=SimpleNamespace(max_model_len=longest),
    )


def asked(drafts, *texts, sampled=None):
    """What ``drafts`` proposes for ``texts``, laid out as vLLM does."""
    ids, lengths = np.full((ROWS, LONGEST), 99, np.int32), np.full(ROWS, LONGEST, np.int32)
    for row, text in enumerate(texts):
        ids[row, : len(text)], lengths[row] = text, len(text)
    given = sampled or [text[-1:] for text in texts]
    return drafts.propose(given, lengths, ids, slot_mappings=None)


def test_what_followed_before_is_drafted_as_far_as_it_matched():
    text = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    # vLLM calls it of every draft
    SuffixDrafts(config()).load_model(object())
    # one token that matches says too little
    assert asked(SuffixDrafts(config()), [*text, 0, 3], [*text, 0, 2, 3, 4]) == [[], [5, 6, 7]]
    assert asked(SuffixDrafts(config()), [*text, 1, 2, 3, 4, 5]) == [[6, 7, 8, 9]]
    assert asked(SuffixDrafts(config(most=2)), [*text, 1, 2, 3, 4, 5]) == [[6, 7]]


def test_rows_change_places_and_each_text_is_read_once(monkeypatch):
    from eepass.runtime.drafting.suffix import SuffixDraft

    drafts, read, follow = SuffixDrafts(config()), [], SuffixDraft.follow
    monkeypatch.setattr(
        SuffixDraft, "follow", lambda self, new: (read.append(list(new)), follow(self, new))
    )
    # the second begins as the first does
    one, two, three = [1, 2, 3, 1, 2], [1, 2, 3, 1, 2, 7], [5, 6, 5, 6, 5]
    asked(drafts, one, two, three)
    read.clear()
    one, two, three = [*one, 3], [*two, 8, 1], [*three, 6]
    assert asked(drafts, three, two, one) == [[5, 6], [], [1, 2, 3]]
    assert read == [[6], [8, 1], [3]]


def test_a_prompt_that_is_not_done_and_a_full_text_get_none():
    text = [1, 2, 3, 1, 2]
    assert asked(SuffixDrafts(config()), text, text, sampled=[[], [2]]) == [[], [3, 1]]
    assert asked(SuffixDrafts(config(longest=6)), text) == [[3]]
    assert asked(SuffixDrafts(config(longest=5)), text) == [[]]


@pytest.mark.parametrize("shared", [False, True])
def test_texts_of_others_are_read_only_where_that_is_asked_for(shared):
    drafts = (SharedSuffixDrafts if shared else SuffixDrafts)(config())
    asked(drafts, [1, 2, 3, 4, 5, 6])
    asked(drafts, [8, 9])
    assert asked(drafts, [7, 1, 2, 3], [8, 9, 9]) == [[4, 5, 6] if shared else [], []]


def test_a_configuration_that_is_another_is_named():
    with pytest.raises(InputError, match="num_speculative_tokens"):
        SuffixDrafts(SimpleNamespace(speculative_config=SimpleNamespace()))
