"""Other people's engines on the same weights, where they are installed."""

from __future__ import annotations

import importlib.util
import json
import shutil
import statistics
import subprocess
import sys
from typing import Any

from benchmarks.suite import measuring, reference
from benchmarks.suite.bench import ROOT, Bench
from benchmarks.suite.parts import Notify, Wrong

MODULES = {"vLLM": "vllm", "SGLang": "sglang"}
PROGRAM = ROOT / "benchmarks" / "suite" / "other_engine.py"
SCRIPT_ALONE = "not measured: gpt-fast is a script, not a package"


def others(bench: Bench, notify: Notify) -> dict[str, Any]:
    """Milliseconds a token of each, from a checkpoint of the twin, in a process of its own."""
    found: dict[str, Any] = {"ms_per_token": {}, "missing": {"gpt-fast": SCRIPT_ALONE}}
    folder = bench.out / ".twin"
    try:
        for name, module in MODULES.items():
            if importlib.util.find_spec(module) is None:
                found["missing"][name] = "not measured: not installed"
                continue
            if not folder.exists():
                need = 1.1 * measuring.weight_bytes(bench.twin)
                if shutil.disk_usage(bench.out).free < need:
                    found["missing"][name] = f"not measured: no {need / 1e9:.0f} GB on the disk"
                    continue
                bench.twin.save_pretrained(folder)
            try:
                found["ms_per_token"][name] = _measured(bench, module, str(folder))
            except Wrong as error:
                found["missing"][name] = f"not measured: {error}"
            notify(found)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return found


def _measured(bench: Bench, module: str, folder: str) -> float:
    order = {"module": module, "folder": folder, "prompts": bench.prompts,
             "tokens": bench.new_tokens, "length": bench.max_length}  # fmt: skip
    try:
        ran = subprocess.run(
            [sys.executable, str(PROGRAM)], input=json.dumps(order), stdout=subprocess.PIPE,
            stderr=sys.stderr, text=True, timeout=bench.seconds_left() / 2, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise Wrong(f"it took more than {error.timeout:.0f} s") from error
    if ran.returncode:
        raise Wrong(f"it ended with {ran.returncode}; log.txt says why")
    answer = json.loads(ran.stdout.splitlines()[-1])
    limit = bench.limit
    verdict = reference.Verdict()
    for ids, tokens in zip(bench.prompts, answer["said"], strict=True):
        verdict.judge(reference.follow(bench.twin, ids, tokens)[1], tokens, limit, module)
    verdict.found()
    return statistics.median(answer["ms_per_token"])
