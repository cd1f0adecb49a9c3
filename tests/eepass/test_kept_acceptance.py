"""What is learned of draft tokens is kept between processes, and nothing damaged is believed."""

import json
import shutil

import pytest
from models import tiny_model

from eepass.codegen.cpu.native import build_kernels
from eepass.config import ExitConfig
from eepass.kept import acceptance
from eepass.kept.acceptance import ACCEPTANCE, MOST_COUNTED, KeptAcceptance
from eepass.kept.splits import kept_entries
from eepass.model import transform
from eepass.runtime.drafting.planner import Planner


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of its own, with the kernels that are built already."""
    library = build_kernels()
    (tmp_path / "eepass").mkdir()
    shutil.copy(library, tmp_path / "eepass")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("eepass.kept.splits.KEPT", "kept")
    monkeypatch.setattr(acceptance, "PAUSE", 0.0)


def learned(bins, passes=100):
    planner = Planner({1: 1.0, 4: 1.1}, passes=passes)
    planner.acceptance.observed = dict(bins)
    return planner


def recalled(key="model"):
    planner = Planner({1: 1.0, 4: 1.1})
    KeptAcceptance(key).recall(planner)
    return planner


def test_the_next_process_starts_with_what_was_learned():
    before = learned({(0, 1): (30.0, 40.0), (1, 2, 3): (900.0, 1000.0)})
    before.recall([1.2, 0.5, -0.25, 0.0, 1.0])
    KeptAcceptance("model").keep(before)
    after = recalled()
    # another text may be another matter: old observations count like a few
    assert after.acceptance.observed[0, 1] == pytest.approx((30, 40))
    assert after.acceptance.observed[1, 2, 3] == pytest.approx((0.9 * MOST_COUNTED, MOST_COUNTED))
    assert after.learned() == [1.2, 0.5, -0.25, 0.0, 1.0]
    assert not recalled("another").acceptance.observed


def test_it_is_written_when_there_is_something_new():
    kept = KeptAcceptance("model")
    kept.keep(learned({(0, 1): (3.0, 4.0)}, passes=5))
    assert not recalled().acceptance.observed
    kept.keep(learned({(0, 1): (3.0, 4.0)}))
    kept.keep(learned({(0, 1): (9.0, 9.0)}, passes=101))
    assert recalled().acceptance.observed == {(0, 1): (3.0, 4.0)}
    KeptAcceptance("").keep(learned({(0, 1): (3.0, 4.0)}))
    assert len(list(kept_entries().folder.iterdir())) == 1


@pytest.mark.parametrize(
    "text",
    (
        "[]", "{}", "no", '{"bins": {"0,1": [5, 4]}, "asked": []}',
        '{"bins": {"0,x": [1, 2]}, "asked": []}', '{"bins": {"0,1": [1, 1e999]}, "asked": []}',
        '{"bins": {"0,1": [1]}, "asked": []}', '{"bins": {"0,1": [1, 2]}, "asked": ["a"]}',
        json.dumps({"bins": {",".join("1" * 9): [1, 2]}, "asked": []}),
    ),
)  # fmt: skip
def test_what_is_damaged_is_ignored(text):
    kept_entries().write("acceptance-model-none", {ACCEPTANCE: text.encode()})
    planner = recalled()
    assert not planner.acceptance.observed
    assert planner.learned() == Planner({1: 1.0, 4: 1.1}).learned()


def test_it_is_bounded(monkeypatch):
    monkeypatch.setattr(acceptance, "MOST_BINS", 10)
    KeptAcceptance("model").keep(learned({(0, n): (1.0, float(n + 1)) for n in range(50)}))
    assert len(recalled().acceptance.observed) == 10


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
