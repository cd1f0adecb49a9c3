"""The text of ``benchmarks/long_context.py`` holds what is asked for, where it says."""

from benchmarks.long_context import CITIES, PAIRS, Text


def encode(text):
    return [ord(letter) for letter in text]


def decode(ids):
    return "".join(map(chr, ids))


def test_answers_stand_in_the_text_at_ten_depths():
    made = Text(encode, 60_000)
    assert len(made.ids) == 60_000
    assert len(made.stands) == len(made.questions["needles"]) == len(CITIES) == 10
    for place, (question, number) in zip(made.stands, made.questions["needles"], strict=True):
        said = decode(made.ids[place : place + 120])
        assert said.lower().count(f"{decode(question).strip().lower()} {number}.") == 2
    depths = [place / 60_000 for place in made.stands]
    assert all(abs(depth - (n + 0.5) / 10) < 0.04 for n, depth in enumerate(depths))
    text = decode(made.ids)
    assert text.count(" = ") >= PAIRS
    for question, value in made.questions["pairs"]:
        assert f"{decode(question).strip()} {value}\n" in text
    assert made.ids == Text(encode, 60_000).ids
