"""What the kernels need on a GPU stays within ``kernel_budget.json``, checked without a GPU.

Compiling wants an interpreter of its own: here Triton's kernels are interpreted.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BUDGET = json.loads((Path(__file__).parent / "kernel_budget.json").read_text())
COMPILE = """
import json, sys, torch
from eepass.codegen.kernels.catalogue import KvSizes, Sizes, kernels
from eepass.codegen.kernels.compile import compile_launch
from eepass.plan import Channels, HeadChain, KvForm

chain = HeadChain("rms", 1e-5, "norm", "", 0.0, "head", "")
own = Channels(0, 128, 1)
form = KvForm("rms", 1e-5, 0.0, "norm", "", "k", "", "v", "", "", "", "none", "cos", "sin", 128,
              False, 32, 128, own, own, False)
kv = KvSizes(8, 4096, form, 4096, 4096, torch.bfloat16)
found = {}
for rows in (1, 8):
    sizes = Sizes(rows, 4096, 32000, 8192, 4, 512, 128, torch.float32, torch.bfloat16,
                  kv if rows == 1 else None)
    for name, launch in kernels(chain, sizes).items():
        made = compile_launch(launch, 90)
        found[f"{name} x{rows}"] = [made.registers, made.spills, made.shared_bytes]
json.dump(found, sys.stdout)
"""


def run(code, *arguments):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, env=environment, capture_output=True,
        text=True, check=False,
    )  # fmt: skip


def test_registers_spills_and_shared_memory_of_a_7b_model():
    pytest.importorskip("triton")
    result = run(COMPILE)
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads(result.stdout)
    assert found.keys() == BUDGET.keys()
    for name, (registers, spills, shared) in found.items():
        assert spills == 0, f"{name} spills {spills} bytes"
        most, most_shared = BUDGET[name]
        assert registers <= most, f"{name} takes {registers} registers, not {most}"
        assert shared <= most_shared, f"{name} takes {shared} bytes of shared memory"


def test_a_model_is_compiled_and_written(tmp_path):
    pytest.importorskip("triton")
    code = """
import json, sys
from pathlib import Path
sys.path.insert(0, "tests")
from models import tiny_model
from eepass.ahead_of_time import compile_kernels
out = Path(sys.argv[1])
model = tiny_model("qwen3", num_hidden_layers=2)
json.dump(compile_kernels(model, None, "sm_80", out=out), sys.stdout)
"""
    result = run(code, str(tmp_path))
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads(result.stdout)
    names = {"exit_predictor.lens.exit", "verify_head.full.verify", "draft_topk.score"}
    assert names <= found["kernels"].keys()
    for kernel in found["kernels"].values():
        assert kernel["registers"] > 0 and kernel["spills"] == 0
        assert kernel["bytes"] > 0 and kernel["predicted_us"] > 0
    written = json.loads((tmp_path / "kernels.json").read_text())
    assert written["kernels"] == found["kernels"]
    for key in written["cubins"]:
        assert (tmp_path / f"{key}.cubin").read_bytes()[:4] == b"\x7fELF"
