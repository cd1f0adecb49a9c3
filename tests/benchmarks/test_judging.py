"""What the suite calls right, near and wrong, and how it counts time."""

import re
from pathlib import Path
from time import monotonic

import pytest
import torch

from benchmarks.suite import reference, summary, times
from benchmarks.suite.bench import Bench, Options
from benchmarks.suite.correctness import run_tests
from benchmarks.suite.engines import Answer
from benchmarks.suite.measuring import in_turns, paired_ratio
from benchmarks.suite.parts import Missing, Wrong
from benchmarks.suite.step_time import KINDS, split_spans
from benchmarks.suite.times import System

ROOT = Path(__file__).parents[2]
IDS = [5, 9, 33, 17, 60, 81, 12]


def test_an_answer_is_judged_along_itself(llama):
    tokens = reference.greedy(llama, IDS, 12)
    limits = reference.limits(llama, IDS)
    limit = limits[-1]
    assert len(limits) == 5 and 0 < limit < 1e-3
    verdict = reference.Verdict()
    verdict.judge(reference.follow(llama, IDS, tokens)[1], tokens, limit, "it")
    assert verdict.found()["equal"] == 12
    # another token in the middle is wrong, though all after it are right after it
    other = [*tokens[:6], (tokens[6] + 1) % 160]
    other += reference.greedy(llama, [*IDS, *other], 5)
    with pytest.raises(Wrong, match="token 6 of 12"):
        verdict.judge(reference.follow(llama, IDS, other)[1], other, limit, "it")


def test_near_ties_are_counted_and_many_of_them_are_an_error():
    logits = torch.zeros(10, 4)
    logits[:, 2] = 1.0
    logits[3, 1] = 1.0 + 1e-6
    verdict = reference.Verdict()
    verdict.judge(logits, [2] * 10, 1e-4, "it")
    assert (verdict.equal, verdict.near_ties) == (9, 1)
    verdict.judge(logits, [1] * 10, 2.0, "it")
    with pytest.raises(Wrong, match="10 of 20"):
        verdict.found()


def test_hidden_states_are_those_between_the_layers(llama):
    states, logits = reference.follow(llama, IDS, [4, 5, 6])
    hidden = llama(torch.tensor([[*IDS, 4, 5]]), output_hidden_states=True).hidden_states
    assert len(states) == 5
    for own, expected in zip(states[:-1], hidden[:-1], strict=True):
        assert torch.equal(own, expected[0, -3:])
    last = llama.lm_head(llama.model.norm(states[-1]))
    assert torch.allclose(last, logits, atol=1e-5)


class Clock:
    """Stands in for a bench that has all the time, or none."""

    def __init__(self, left):
        self.left = left

    def seconds_left(self):
        return self.left


@pytest.mark.parametrize(("left", "rounds"), ((100.0, 4), (0.0, 1)))
def test_systems_take_turns_after_a_warm_up_while_there_is_time(left, rounds):
    ran = []

    def system(name, base):
        def run():
            ran.append(name)
            return base * len(ran)

        return run

    seen = []
    systems = {"a": system("a", 1.0), "b": system("b", 2.0)}
    times = in_turns(Clock(left), systems, 4, lambda times: seen.append(len(times["a"])))
    assert ran[:4] == ["a", "b", "a", "b"] and ran[4:6] == (["b", "a"] if rounds > 1 else [])
    assert len(times["a"]) == len(times["b"]) == rounds == seen[-1]


def test_what_is_wrong_gets_no_time(monkeypatch):
    bench = Bench(Options("cpu", True, 0, 6, "", "", ""))
    bench.ends = monotonic() + 100
    begun = []

    def good(ids):
        begun.append(ids)
        return Answer(reference.greedy(bench.twin, ids, 6), [4] * 6, 0.5)

    def bad(ids):
        tokens = good(ids).tokens
        return Answer([*tokens[:3], (tokens[3] + 1) % 160, *tokens[4:]], [4] * 6, 0.1)

    def broken(ids):
        raise RuntimeError("no such kernel")

    systems = {"good": good, "bad": bad, "broken": broken}
    made = {name: lambda run=run: System(run) for name, run in systems.items()}
    monkeypatch.setattr(times, "_systems", lambda bench: made)
    found = times.side_by_side(bench, lambda found: None)
    assert found["ms_per_token"] == {"good": 100.0} and set(found["quality"]) == {"good"}
    assert "token 3 of 6" in found["missing"]["bad"]
    assert found["missing"]["broken"] == "RuntimeError: no such kernel"


def test_an_exact_step_that_errs_gets_no_time(monkeypatch):
    """The draft head's, here, judged after that of the text."""
    bench = Bench(Options("cpu", True, 0, 6, "", "", ""))
    bench.ends = monotonic() + 100
    answers = times._eepass

    def erring(bench, engine, how):
        def answer(ids):
            found = answers(bench, engine, how)(ids)
            if how.name == "drafted":
                found.tokens[3] = (found.tokens[3] + 1) % 160
            return found

        return answer

    monkeypatch.setattr(times, "_eepass", erring)
    with pytest.raises(Wrong, match="token 3 of 6"):
        times.exact_step(bench, lambda found: None, "host")


def test_ratios_are_paired():
    times = {"a": [2.0, 20.0, 200.0], "b": [1.0, 10.0, 100.0]}
    assert paired_ratio(times, "a", "b") == 2.0


def test_a_steps_time_is_told_apart_by_kernel():
    spans = [
        (10.0, 14.0, "triton_red_fused_mm"),
        (13.0, 15.0, "_exit_kernel"),  # half of it under the one before
        (17.0, 18.0, "_verify_kernel"),
        (17.2, 17.8, "another"),  # wholly under it
        (18.0, 21.0, "gemv"),
    ]
    found = split_spans(spans)
    assert found["segments"] == 7.0 and found["predictors"] == 1.0 and found["verify"] == 1.0
    assert found["gaps"] == 2.0 and sum(found.values()) == 11.0


def test_every_kernel_has_its_kind():
    sources = (ROOT / "codegen" / "kernels").glob("*.py")
    names = {
        name for path in sources for name in re.findall(r"def (_\w+_kernel)\(", path.read_text())
    }
    marks = {mark for kind in KINDS.values() for mark in kind if mark.startswith("_")}
    assert names == marks


def test_tests_are_counted_and_named(tmp_path):
    file = tmp_path / "test_it.py"
    file.write_text(
        "import pytest\npytestmark = pytest.mark.gpu\n"
        "def test_good(): pass\ndef test_bad(): assert False\n"
        "@pytest.mark.skip\ndef test_skipped(): pass\n"
    )
    found = run_tests([file], tmp_path / "report.xml", 60)
    assert (found["run"], found["skipped"]) == (2, 1)
    assert len(found["failed"]) == 1 and found["failed"][0].endswith("test_bad")
    file.write_text("import pytest, time\n@pytest.mark.gpu\ndef test_slow(): time.sleep(60)\n")
    with pytest.raises(Missing, match="cut off after 2 s"):
        run_tests([file], tmp_path / "report.xml", 2)


def test_aims_are_met_or_not_or_open():
    sections = {
        "bandwidth": {"roofline_ms": 2.0},
        "twin": {"layers": 30},
        "side by side": {
            "ms_per_token": {"hf compiled": 3.0, "eepass dense, device": 2.5,
                             "eepass exits, device": 2.2},
            "quality": {"eepass exits, device": {"agreement": 0.98, "mean_exit_layer": 26.0}},
        },
        "forced exit device": {"8": {"ratio": 1.2}},
        "exact step device": {"ways": {"text": {"pass_of_dense": 1.31}}},
    }  # fmt: skip
    found = summary.aims(sections)
    assert found["dense, of the roofline, at least 0.85"] == {"found": 0.8, "met": False}
    assert found["dense, of HF compiled, at least 1"]["met"]
    assert found["never leaving, time of dense, at most 1.02"] == {"found": None, "met": None}
    assert not found["leaving after 8, time of the cut model, at most 1.05"]["met"]
    passes = "a whole pass by a dense one's time, at most 1.3"
    assert found[f"exact, drafts of text: {passes}"] == {"found": 1.31, "met": False}
    assert found[f"exact, drafts of head and text: {passes}"]["met"] is None
    share = found["real exits, of what the exit layer allows, at least 0.90"]
    assert share["met"] and abs(share["found"] - 2.5 / 2.2 / (30 / 26)) < 1e-9
    assert all(aim["met"] is None for aim in summary.aims({}).values())
