"""What is learned of draft tokens is kept between processes, and nothing damaged is believed."""

import json

import pytest
from kept_cache import keep_in
from models import tiny_model

from eepass.config import ExitConfig
from eepass.kept import acceptance
from eepass.kept.acceptance import ACCEPTANCE, MOST_COUNTED, KeptAcceptance
from eepass.kept.splits import kept_entries
from eepass.model import transform


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    keep_in(tmp_path, monkeypatch)
    monkeypatch.setattr(acceptance, "PAUSE", 0.0)


def recalled(key="model"):
    return KeptAcceptance(key).recall()


def test_the_next_process_starts_with_what_was_learned():
    bins = {(0, 1): (30.0, 40.0), (1, 2, 3): (900.0, 1000.0)}
    KeptAcceptance("model").keep(100, bins, [1.2, 0.5, -0.25])
    found, learned = recalled()
    # another text may be another matter: old observations count like a few
    assert found[0, 1] == pytest.approx((30, 40)) and learned == [1.2, 0.5, -0.25]
    assert found[1, 2, 3] == pytest.approx((0.9 * MOST_COUNTED, MOST_COUNTED))
    assert recalled("another") == ({}, [])


def test_it_is_written_when_there_is_something_new():
    kept = KeptAcceptance("model")
    kept.keep(5, {(0, 1): (3.0, 4.0)}, [])
    assert not recalled()[0]
    kept.keep(100, {(0, 1): (3.0, 4.0)}, [])
    kept.keep(101, {(0, 1): (9.0, 9.0)}, [])
    assert recalled() == ({(0, 1): (3.0, 4.0)}, [])
    KeptAcceptance("").keep(100, {(0, 1): (3.0, 4.0)}, [])
    assert len(list(kept_entries().folder.iterdir())) == 1


@pytest.mark.parametrize(
    "text",
    (
        "[]", "{}", "no", '{"bins": {"0,1": [5, 4]}, "learned": []}',
        '{"bins": {"0,x": [1, 2]}, "learned": []}', '{"bins": {"0,1": [1, 1e999]}, "learned": []}',
        '{"bins": {"0,1": [1]}, "learned": []}', '{"bins": {"0,1": [1, 2]}, "learned": ["a"]}',
        json.dumps({"bins": {",".join("1" * 9): [1, 2]}, "learned": []}),
    ),
)  # fmt: skip
def test_what_is_damaged_is_ignored(text):
    kept_entries().write("acceptance-model-none", {ACCEPTANCE: text.encode()})
    assert recalled() == ({}, [])


def test_it_is_bounded(monkeypatch):
    monkeypatch.setattr(acceptance, "MOST_BINS", 10)
    KeptAcceptance("model").keep(100, {(0, n): (1.0, float(n + 1)) for n in range(50)}, [])
    assert len(recalled()[0]) == 10


def test_a_model_keeps_and_recalls():
    found = []
    for _ in range(2):
        model = transform(tiny_model("llama"), max_length=128)
        engine = model.configure(ExitConfig())
        engine.measure()
        found.append(dict(engine.planner.acceptance.observed))
        # the tiny model repeats itself
        list(engine.generate([63, 80, 29, 104, 125], 60))
    assert not found[0] and found[1]
