"""benchmarks/kernels.py runs end to end where there is no GPU: every kernel right, none timed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_every_kernel_is_checked_before_it_could_be_timed(tmp_path):
    pytest.importorskip("triton")
    file = tmp_path / "kernels.json"
    options = ("--device", "cpu", "--hidden", "64", "--json", str(file))
    command = [sys.executable, "benchmarks/kernels.py", *options]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)}
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads(file.read_text())["kernels"]
    operators = {name.split(",")[0] for name in found}
    assert operators == {
        "exit_predictor", "verify_head", "draft_topk", "linear_rows", "packed_rows",
        "attend_spans",
    }  # fmt: skip
    for name, row in found.items():
        assert row["bytes"] > 0 and row["triton"] == "right, not timed", name
