"""What still runs on a device where something breaks: a dry run with injected faults."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

PARTS = (
    "environment", "twin", "compiled", "equality host", "equality engine", "bandwidth",
    "side by side",
)  # fmt: skip


@pytest.fixture(scope="module")
def values(tmp_path_factory):
    out = tmp_path_factory.mktemp("faults")
    command = [sys.executable, Path(__file__).with_name("suite_with_faults.py"), "--out", out]
    command += ["--device", "cpu", "--tiny", "--minutes", "4", "--only", ", ".join(PARTS)]
    command += ["--new-tokens", "8"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 1, ended.stdout + ended.stderr
    return json.loads((out / "results.json").read_text())


def test_what_breaks_takes_only_itself_along(values):
    assert values["finished"]
    states = {name: entry["state"] for name, entry in values["parts"].items()}
    broken = {"twin": "failed", "equality host": "failed", "bandwidth": "cut off"}
    assert states == {**dict.fromkeys(PARTS, "done"), **broken}


def test_each_says_why_and_keeps_what_it_had(values):
    why = {name: entry.get("why", "") for name, entry in values["parts"].items()}
    assert why["twin"].startswith("wrong: the twin's logits are off by")
    assert values["sections"]["twin"]["off_float32"] > 0
    assert "capturing: use launch='calls'" in why["equality host"]
    assert values["sections"]["bandwidth"] == {"half": 1}


def test_systems_that_capture_nothing_are_measured(values):
    side = values["sections"]["side by side"]
    assert {name for name in side["missing"] if "host" in name} == {
        "eepass dense, host", "eepass exits, host", "eepass exact, host",
    }  # fmt: skip
    assert side["missing"]["hf compiled"] == "RuntimeError: no compiler"
    ways = ("dense", "exits", "exact")
    assert side["ms_per_token"].keys() == {"hf eager", *(f"eepass {how}, engine" for how in ways)}
