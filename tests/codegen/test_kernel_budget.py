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


WRITE = """
import json, sys, torch
from pathlib import Path
sys.path.insert(0, "tests")
from models import random_artifact, tiny_model
from eepass.bundle.gpu_kernels import compile_split, ready_kernels
from eepass.codegen.kernels.register import register_kernels
from eepass.codegen.kernels.specialise import parameters_of
from eepass.config import ExitConfig
from eepass.passes.exits.fuse_exit_predictor import fuse_exit_predictor
from eepass.passes.pipeline import split_decoder
from eepass.passes.report import PassReport
from eepass.planning import exit_tensors, make_plan

out = Path(sys.argv[1])
model = tiny_model("qwen3", num_hidden_layers=3)
artifact = random_artifact(model)
with torch.no_grad():
    split = split_decoder(model, 1, 64)[0]
found = compile_split(split, artifact, "sm_80", (1, 4), out)

# a runtime that finds its kernels there, whatever rows it calls them with
class Noting:
    def __init__(self):
        self.cubins, self.names = ready_kernels(out, 86), []
    def launch(self, launch):
        kernel = self.cubins.find(launch)
        ours = kernel is not None and kernel.name == launch.name
        fits = ours and kernel.parameters == parameters_of(launch)[0]
        self.names.append([launch.name, fits])
        return True

ready = Noting()
register_kernels(ready, key="CPU")
plan = make_plan(ExitConfig().approximate(0.98), artifact, 3)
tensors = exit_tensors("default", artifact, split.tensors, split)
tensors = {**split.tensors, **tensors, **plan.threshold_tensors()}
def call(segment, *given):
    values = iter(given)
    segment.graph(*(tensors[r.name] if r.kind == "parameter" else next(values)
                  for r in segment.inputs))
with torch.no_grad():
    for rows in (1, 4):
        fused = fuse_exit_predictor(split, plan, tensors, PassReport(), rows)
        hidden, k = torch.zeros(1, rows, split.hidden_size), plan.draft_tokens
        draft, chances = torch.zeros(rows, k, dtype=torch.long), torch.zeros(rows, k)
        for segment in fused.predictors.values():
            call(segment, hidden, draft, chances)
        for segment in (fused.verify, fused.final):
            call(segment, hidden, draft)
        call(fused.draft, hidden)
json.dump({**found, "called": ready.names}, sys.stdout)
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A model's kernels in a folder, and the report on them."""
    pytest.importorskip("triton")
    folder = tmp_path_factory.mktemp("kernels")
    result = run(WRITE, str(folder))
    assert result.returncode == 0, result.stderr[-2000:]
    return folder, json.loads(result.stdout)


def test_a_model_is_compiled_and_written(written):
    folder, found = written
    names = {"exit_predictor.lens.exit x1", "verify_head.full.verify x4", "draft_topk.score x1"}
    assert names <= found["kernels"].keys()
    for kernel in found["kernels"].values():
        assert kernel["registers"] > 0 and kernel["spills"] == 0
        assert kernel["bytes"] > 0 and kernel["predicted_us"] > 0
    index = json.loads((folder / "kernels.json").read_text())
    assert index["kernels"] == found["kernels"]
    for key in index["cubins"]:
        assert (folder / f"{key}.cubin").read_bytes()[:4] == b"\x7fELF"


def test_what_a_runtime_calls_is_there_with_the_parameters_it_packs(written):
    _, found = written
    called = {name for name, _ in found["called"]}
    kernels = {"exit", "gate", "state", "verify", "score", "merge"}
    assert called == {f"_{name}_kernel" for name in kernels}
    assert [name for name, fits in found["called"] if not fits] == []


def test_kernels_for_another_gpu_or_of_another_source_are_refused(written):
    pytest.importorskip("triton")
    folder, _ = written
    refuse = """
import json, sys
from pathlib import Path
from eepass.bundle.gpu_kernels import ready_kernels
from eepass.errors import InputError
folder, index = Path(sys.argv[1]), Path(sys.argv[1]) / "kernels.json"
def refusal(*arguments):
    try:
        ready_kernels(*arguments)
    except InputError as error:
        return str(error)
refusals = [refusal(folder, 90), refusal(folder)]
whole = index.read_text()
stored = json.loads(whole)
stored["sources"]["_exit_kernel"] = "of another time"
index.write_text(json.dumps(stored))
refusals.append(refusal(folder, 80))
index.write_text(whole)
json.dump(refusals, sys.stdout)
"""
    result = run(refuse, str(folder))
    assert result.returncode == 0, result.stderr[-2000:]
    other_gpu, no_gpu, other_source = json.loads(result.stdout)
    assert "compiled for sm_80, this GPU is sm_90" in other_gpu
    assert "none is here" in no_gpu
    assert "_exit_kernel has another source than here" in other_source
