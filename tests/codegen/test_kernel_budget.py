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
import json, re, sys, torch, triton
from eepass.codegen.kernels.catalogue import Sizes, kernels
from eepass.codegen.kernels import attend_rows, linear_rows, packed_rows
from eepass.codegen.kernels.compile import compile_launch
from eepass.codegen.kernels.launch import Scratch
from eepass.kernel_forms import HeadChain
from eepass.ops.packed import INT8, ROW, UNROUNDED
from eepass.ops.packing import block_size, form_number

chain = HeadChain("rms", 1e-5, "norm", "", 0.0, "head", "")
compiled, triton.compile = [], (lambda make: lambda *a, **o: (compiled.append(make(*a, **o)),
                                                              compiled[-1])[1])(triton.compile)
found = {}
for target in map(int, sys.argv[1:]):
    for rows in (1, 8):
        sizes = Sizes(rows, 4096, 32000, 8192, 4, 512, 128, torch.float32, torch.bfloat16)
        state = torch.empty(rows, 4096, dtype=torch.bfloat16, device="meta")
        # one weight whose inputs are divided among programs, and one whose inputs are not
        weights = [state.new_empty(outputs, 4096) for outputs in (1024, 4096)]
        scratch = Scratch(state)
        launches = linear_rows.launches(state, weights, [None, None], scratch=scratch)[0]
        names = ["linear_rows.divided", "linear_rows.whole"]
        for kind, group, activations in (("q4_0", 0, INT8), ("u4", 128, UNROUNDED),
                                         ("q8_0", 0, INT8), ("u8", 0, ROW)):
            form = form_number(kind, group)
            bits = state.new_empty(256, block_size(form, 4096), dtype=torch.uint8)
            launches += packed_rows.launches(state, [bits], [form], [4096], [None], activations,
                                             scratch=scratch)[0]
            names.append(f"packed_rows.{kind}")
        # 32 query heads, 8 groups, a cache of 32k slots
        mask, spans = state.new_empty(rows, 32768), state.new_empty(rows, 3, dtype=torch.long)
        for kind, channels, seen in (("rows", 128, mask), ("spans", 128, spans),
                                     ("spans.wide", 256, spans)):
            q, cache = state.new_empty(32, rows, channels), state.new_empty(8, 32768, channels)
            made = attend_rows.launches if seen is mask else attend_rows.span_launches
            launches += made(q, cache, cache, seen, 0.1, scratch=scratch)[0]
            names += [f"attend_{kind}.attend", f"attend_{kind}.combine"]
        for name, launch in {**kernels(chain, sizes), **dict(zip(names, launches))}.items():
            made = compile_launch(launch, target)
            copies = sorted(set(re.findall(r"cp\\.async\\.(c.)", compiled[-1].asm["ptx"])))
            used = [made.registers, made.spills, made.shared_bytes, copies]
            found.setdefault(f"{name} x{rows}", {})[target] = used
json.dump(found, sys.stdout)
"""
OTHERS = ("80", "86", "89", "100", "120")


def run(code, *arguments):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, env=environment, capture_output=True,
        text=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("targets", (("90",), pytest.param(OTHERS, marks=pytest.mark.slow)))
def test_registers_spills_and_shared_memory_of_a_7b_model(targets):
    pytest.importorskip("triton")
    result = run(COMPILE, *targets)
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads(result.stdout)
    assert found.keys() == BUDGET.keys()
    for name, by_target in found.items():
        for target, (registers, spills, shared, copies) in by_target.items():
            what = f"{name} on sm_{target}"
            assert spills == 0, f"{what} spills {spills} bytes"
            most, most_shared = BUDGET[name][target]
            assert registers <= most, f"{what} takes {registers} registers, not {most}"
            assert shared <= most_shared, f"{what} takes {shared} bytes of shared memory"
            if (
                name.startswith(("linear_rows", "packed_rows", "attend_spans"))
                and ".combine" not in name
            ):
                # whole cache lines, 16 bytes a thread, past the registers; .ca is for fewer bytes,
                # as a few rows of x have beside codes
                fewer = "ca" in copies and not name.startswith("packed_rows")
                assert "cg" in copies and not fewer, f"{what} loads bit by bit"


REPORT = """
import json, sys, torch
sys.path.insert(0, "tests")
from models import random_artifact, tiny_model
from eepass.bundle.gpu_kernels import compile_split
from eepass.passes.pipeline import split_decoder

model = tiny_model("qwen3", num_hidden_layers=3)
with torch.no_grad():
    split = split_decoder(model, 1, 64)[0]
json.dump(compile_split(split, random_artifact(model), "sm_80", 4), sys.stdout)
"""


def test_a_model_is_compiled_and_reported():
    pytest.importorskip("triton")
    result = run(REPORT)
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads(result.stdout)
    assert (found["target"], found["rows"]) == ("sm_80", 4)
    names = {"exit_predictor.lens.exit", "verify_head.full.verify", "draft_topk.score"}
    assert names <= found["kernels"].keys()
    for kernel in found["kernels"].values():
        assert kernel["registers"] > 0 and kernel["spills"] == 0
        assert kernel["bytes"] > 0 and kernel["predicted_us"] > 0
