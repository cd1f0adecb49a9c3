"""The suite goes on where a part crashes, hangs or has no time; what was found stays."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.suite.parts import Part, all_parts
from benchmarks.suite.results import Results, plain
from benchmarks.suite.supervisor import Supervisor

ROOT = Path(__file__).parents[2]
# answers as the worker does, and behaves as the part's name says
WORKER = """
import json, os, sys, time
for line in sys.stdin:
    part = json.loads(line)["part"]
    def say(**values): print(json.dumps(values), flush=True)
    if part == "crash":
        say(found={"half": 1})
        os._exit(7)
    if part == "hang":
        say(found={"rounds": [1, 2]})
        time.sleep(600)
    if part == "skip":
        say(state="skipped", why="no such thing")
    elif part == "wrong":
        say(state="failed", why="wrong: off by 3", wrong=True)
    else:
        say(found={"pid": os.getpid()}, state="done")
"""


def part(name, cost=0.0, limit=30.0, essential=False, alone=False):
    return Part(name, "", "", cost, limit, essential=essential, alone=alone)


def run(tmp_path, parts, seconds=60.0):
    drawn = []
    results = Results(tmp_path, [p.name for p in parts], {})
    command = [sys.executable, "-c", WORKER]
    Supervisor(parts, command, results, seconds, lambda *given: drawn.append(given[2])).run()
    values = json.loads((tmp_path / "results.json").read_text())
    assert values["finished"]
    return values, drawn


def test_one_part_takes_only_itself_along(tmp_path):
    names = ["first", "crash", "second", "skip", "hang", "third"]
    parts = [part(name, limit=2.0 if name == "hang" else 30.0) for name in names]
    values, drawn = run(tmp_path, parts)
    states = {name: entry["state"] for name, entry in values["parts"].items()}
    assert states == {
        "first": "done", "crash": "failed", "second": "done", "skip": "skipped",
        "hang": "cut off", "third": "done",
    }  # fmt: skip
    assert "ended with 7" in values["parts"]["crash"]["why"]
    assert values["parts"]["skip"]["why"] == "no such thing"
    # what they had is kept, and each of them made way for a new process
    found = values["sections"]
    assert found["crash"] == {"half": 1} and found["hang"] == {"rounds": [1, 2]}
    pids = [found[name]["pid"] for name in ("first", "second", "third")]
    assert len(set(pids)) == 3 and drawn == names
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_what_there_is_no_time_for_is_not_begun(tmp_path):
    values, _ = run(tmp_path, [part("first", cost=1), part("dear", cost=100), part("last")], 20.0)
    states = {name: entry["state"] for name, entry in values["parts"].items()}
    assert states == {"first": "done", "dear": "not begun", "last": "done"}
    assert "takes about 100 s" in values["parts"]["dear"]["why"]


def test_without_an_essential_part_nothing_is_begun(tmp_path):
    values, _ = run(tmp_path, [part("skip", essential=True), part("last")])
    assert values["parts"]["last"] == {"state": "not begun", "why": "skip: no such thing"}


def test_a_result_that_is_wrong_stops_nothing_but_a_part_that_is_not_there_does(tmp_path):
    values, _ = run(tmp_path, [part("wrong", essential=True), part("last")])
    assert values["parts"]["wrong"]["state"] == "failed"
    assert values["parts"]["last"]["state"] == "done"


def test_a_part_alone_has_a_process_of_its_own(tmp_path):
    parts = [part(name, alone=name in ("second", "third")) for name in ("first", "second", "third")]
    values, _ = run(tmp_path, [*parts, part("last"), part("end")])
    pids = [values["sections"][p]["pid"] for p in ("first", "second", "third", "last", "end")]
    assert len(set(pids[:4])) == 4 and pids[3] == pids[4]


def test_what_profiles_comes_last_and_alone():
    for device in ("cuda", "cpu"):
        parts = all_parts(device)
        profiled = [p for p in parts if p.module == "step_time"]
        assert profiled == parts[-len(profiled) :] and all(p.alone for p in profiled)


def test_told_to_stop_it_leaves_whole_results_and_no_process(tmp_path):
    program = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from benchmarks.suite.parts import Part
from benchmarks.suite.results import Results
from benchmarks.suite.supervisor import Supervisor, end_on_signals
parts = [Part(name, "", "", 0, 60) for name in ("first", "hang")]
results = Results(Path({str(tmp_path)!r}), ["first", "hang"], {{}})
supervisor = Supervisor(parts, [sys.executable, "-c", {WORKER!r}], results, 60, lambda *_: None)
end_on_signals(supervisor)
supervisor.run()
"""
    path = tmp_path / "results.json"

    def found():
        values = json.loads(path.read_text()) if path.exists() else {"sections": {}}
        return values if values["sections"].get("hang") else None

    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 30
        while not (values := found()) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 128 + signal.SIGTERM
    assert values["parts"]["hang"]["state"] == "running" and not values["finished"]
    with pytest.raises(ProcessLookupError):
        os.kill(values["sections"]["first"]["pid"], 0)


def test_results_hold_only_what_json_knows():
    values = plain({"a": float("nan"), "b": (1.23456789, True), 3: Path("x")})
    assert values == {"a": None, "b": [1.23457, True], "3": "x"}
    assert json.loads(json.dumps(values, allow_nan=False)) == values
