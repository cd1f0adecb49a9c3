"""Text of tokens as they come: whole characters, and stop strings wherever they are cut."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from eepass.checkpoints.text_stream import TextStream
from eepass.server.stop_strings import StopStrings

LETTERS = st.text("ab", max_size=30)


def by_bytes():
    """Every byte is a token, and so are a few words."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@pytest.mark.parametrize("text", ["plain", "naïve Ελλάδα", "你好 👋🏽 é", "", "\n\n x"])
def test_characters_come_whole(text):
    tokenizer = by_bytes()
    stream = TextStream(tokenizer.decode)
    parts = [stream.add(token) for token in tokenizer.encode(text).ids]
    assert "".join(parts) == text and stream.rest() == ""
    # each as soon as it is there
    assert [part for part in parts if part] == list(text)


def test_half_a_character_at_the_end_is_shown_as_such():
    tokenizer = by_bytes()
    stream = TextStream(tokenizer.decode)
    ids = tokenizer.encode("a👋").ids
    assert "".join(stream.add(token) for token in ids[:-1]) == "a"
    assert stream.rest() == tokenizer.decode(ids[:-1])[1:]


def test_spaces_between_words_survive():
    words = {"▁the": 0, "▁sea": 1, "s": 2, "<end>": 3}
    tokenizer = Tokenizer(models.WordLevel(words, "s"))
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<end>"])
    ids = [0, 1, 2, 3, 1, 0]
    stream = TextStream(tokenizer.decode)
    assert "".join(map(stream.add, ids)) + stream.rest() == tokenizer.decode(ids)


@given(st.lists(LETTERS, max_size=6), st.lists(st.text("ab", min_size=1, max_size=5), max_size=4))
def test_where_text_is_cut_does_not_depend_on_its_parts(parts, stops):
    found = StopStrings(stops)
    shown, ended = "", False
    for part in parts:
        text, ended = found.add(part)
        shown += text
        # nothing that may still be cut is shown
        if ended:
            break
        held = found._held
        assert not held or any(stop.startswith(held) for stop in stops)
    if not ended:
        shown += found.rest()
    assert (shown, ended) == cut("".join(parts), stops)


def cut(text, stops):
    """``text`` up to the stop string that ends first, the longest of several."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - max(map(len, ending))], True
    return text, False
