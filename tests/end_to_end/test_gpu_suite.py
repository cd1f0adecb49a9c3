"""``benchmarks/gpu_suite.py --device cpu --tiny``: the whole suite, on a random tiny model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.suite.parts import CPU_MODES, all_parts, timed_modes

ROOT = Path(__file__).parents[2]
TIMED = timed_modes("cpu")
SCRIPT = ROOT / "benchmarks" / "gpu_suite.py"


def run(*arguments, path=""):
    # a checkout that is not installed, from elsewhere
    environment = {**os.environ, "PYTHONPATH": str(path)}
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        capture_output=True, text=True, check=False, env=environment, cwd=ROOT.parent,
    )  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("suite")
    # machines lent for measuring have torch and transformers, and little else
    for name in ("cryptography", "typer"):
        (out / f"{name}.py").write_text(f"raise ImportError('no {name} here')")
    ended = run("--device", "cpu", "--tiny", "--minutes", 4, "--out", out, path=out)
    log = (out / "log.txt").read_text()
    assert ended.returncode == 0, ended.stdout + ended.stderr + log
    return json.loads((out / "results.json").read_text()), out


def test_every_part_is_there_with_what_it_found_or_why_not(results):
    values, _ = results
    assert list(values["parts"]) == [part.name for part in all_parts("cpu")]
    assert values["finished"]
    for name, entry in values["parts"].items():
        assert entry["state"] in ("done", "skipped"), (name, entry)
        assert bool(values["sections"][name]) == (entry["state"] == "done")
        assert entry["state"] == "done" or entry["why"]
    skipped = {name for name, entry in values["parts"].items() if entry["state"] == "skipped"}
    assert "tests" in skipped
    kernels = values["sections"]["kernels"]["kernels"]
    assert {"linear_rows, 32", "packed_rows, u4, 16", "attend_spans, 300, 16"} <= kernels.keys()
    assert {row["triton"] for row in kernels.values()} == {"right, not timed"}


def test_tokens_are_judged_and_exits_fire(results):
    values, _ = results
    twin = values["sections"]["twin"]
    assert twin["hidden"] == 128 and twin["argmax_as_float32"] == 1.0
    for mode in CPU_MODES:
        found = values["sections"][f"equality {mode}"]
        for how in ("dense", "never"):
            assert found[how]["tokens"] == 32 and found[how]["worst_margin"] <= found["noise"]
        assert found["forced"]["layers"] == 3 and found["forced"]["tokens"] == 3 * 5
        counts = found["exits"]["exit_layers"]
        assert sum(counts) == 30 and sum(counts[1:4]) > 5
        assert found["launch_report"]["mode"] == mode
        assert found["exact"]["equal"] == 32


def test_times_are_in_turns_and_others_named(results):
    values, out = results
    side = values["sections"]["side by side"]
    expected = {f"eepass {how}, {mode}" for how in ("dense", "exits", "exact") for mode in TIMED}
    expected |= {"hf eager", "hf compiled"}
    assert set(side["ms_per_token"]) == expected
    assert len({len(taken) for taken in side["rounds"].values()}) == 1
    # several tokens a pass, where the tiny model repeats itself
    assert side["quality"]["eepass exact, host"]["tokens_a_pass"] > 1.5
    step = values["sections"]["exact step host"]
    assert step["rows"] == [8] and set(step["ways"]) == {"text", "head and text"}
    for way in step["ways"].values():
        assert way["agreement"] == 1.0 and way["tokens_a_pass"] > 1.5
        assert way["pass_of_dense"] > 0
    prompts = values["sections"]["prompts"]
    assert {n: found["passes"] for n, found in prompts.items()} == {"100": [128], "300": [256, 128]}
    for found in prompts.values():
        assert set(found["ms"]) == {"chunks", "small chunks", "hf eager"}
    assert set(values["sections"]["others"]["missing"]) == {"vLLM", "SGLang", "gpt-fast"}
    for mode in TIMED:
        assert values["sections"][f"never exit {mode}"]["ratio"] > 0
        forced = values["sections"][f"forced exit {mode}"]
        assert set(forced) == {"1", "3"} and forced["3"]["ms_per_token"]["cut"] > 0
    assert values["sections"]["step engine"]["real"]["predictors"] > 0
    assert values["sections"]["step host"]["real"]["whole"] > 0
    aims = values["summary"]["aims"]
    assert aims["dense, of the roofline, at least 0.85"]["met"] is None
    for name in ("side_by_side", "forced_exit", "step", "exit_layers"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "| hf compiled |" in (out / "table.md").read_text()


def test_mistakes_are_answered_in_a_line(tmp_path):
    ended = run("--device", "cpu", "--tiny", "--out", tmp_path, "--only", "twin, speed")
    assert ended.returncode == 2 and "--only speed: known are environment" in ended.stderr
    ended = run(
        "--device", "cpu", "--gguf", "no.gguf", "--out", tmp_path, "--only", "twin, bandwidth"
    )
    assert "twin" in ended.stdout and "no.gguf: no such file" in ended.stdout
    values = json.loads((tmp_path / "results.json").read_text())
    assert values["parts"]["bandwidth"]["why"] == "twin: --gguf no.gguf: no such file"
    assert "Traceback" not in ended.stderr and ended.returncode == 1
