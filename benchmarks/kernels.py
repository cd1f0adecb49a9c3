"""Time the Triton kernels on a CUDA device beside their eager and their inductor form.

    python benchmarks/kernels.py [--json kernels-DEVICE.json] [--hidden 4096]
    python benchmarks/kernels.py --device cpu [--hidden 64]      in Triton's interpreter: no times

Each form is captured in a CUDA graph and replayed over copies of its weights that together exceed
the L2 cache; forms are timed in turns and medians reported. ``of copy`` is the bandwidth a kernel
reaches by the bytes it has to read, as a share of the measured copy bandwidth. A form with a wrong
result is not timed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from eepass.masks import spans_at
from eepass.ops import fused, packed, rows
from eepass.ops.packed import INT8
from eepass.ops.packing import GROUP, form_number

L2_BYTES = 160 * 2**20
ROUNDS = 9


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, dtype=dtype) * (shape[-1] ** -0.5 if shape else 1)


def exit_arguments(hidden: int, rank: int, vocabulary: int, rows: int = 1) -> list[Any]:
    k, translator = 4, (None,) * 3
    if rank:
        translator = (torch.ones_like(random(hidden)), random(rank, hidden), random(hidden, rank))
    floats = torch.float32
    return [
        random(rows, hidden) * hidden**0.5, *translator, random(hidden), None,
        random(vocabulary, hidden), None, None, torch.randint(vocabulary, (rows, k)),
        torch.rand(rows, k), random(512, 3 * k, dtype=floats), random(512, dtype=floats),
        random(512, dtype=floats), random(1, dtype=floats), torch.tensor([0.5]), "rms", 1e-5, 0.0,
        1.0, 0.0,
    ]  # fmt: skip


def verify_arguments(hidden: int, vocabulary: int) -> list[Any]:
    draft = torch.randint(vocabulary, (1, 4))
    return [
        random(1, hidden) * hidden**0.5, None, None, None, random(hidden), None,
        random(vocabulary, hidden), None, None, None, draft, "rms", 1e-5, 0.0, 1.0, 0.0, False,
    ]  # fmt: skip


def draft_arguments(hidden: int, vocabulary: int) -> list[Any]:
    z = random(1, hidden) * hidden**0.5
    return [z, random(vocabulary, hidden), None, None, None, 32, 1.0, 0.0]


def rows_arguments(hidden: int, count: int) -> list[Any]:
    """A projection as an MLP has it; eager, that is cuBLAS."""
    return [random(count, hidden) * hidden**0.5, [random(3 * hidden, hidden)], [None]]


def packed_arguments(hidden: int, count: int, kind: str) -> list[Any]:
    """``rows_arguments`` with a weight of 4 or 8 bits, a scale for each 32 inputs."""
    inputs, form = -(-hidden // GROUP) * GROUP, form_number(kind, GROUP)
    codes = torch.randint(16 if kind == "u4" else 256, (3 * hidden, inputs), dtype=torch.uint8)
    scales = torch.rand(3 * hidden, inputs // GROUP) * inputs**-0.5 / 8
    packed = torch.ops.eepass.pack_groups(codes, scales, -8 * scales, form)
    return [random(count, inputs) * inputs**0.5, [packed], [form], [3 * hidden], [None], INT8]


def attention_arguments(hidden: int, length: int, count: int) -> list[Any]:
    """``count`` rows at the end of a text that fills the cache; four query heads a group."""
    channels = min(128, hidden)
    heads = max(hidden // channels, 4)
    spans = spans_at(torch.arange(length - count, length), None)
    q, caches = torch.randn(heads, count, channels), (heads // 4, length, channels)
    keys, values = (torch.randn(caches).to(torch.bfloat16) for _ in range(2))
    return [q.to(torch.bfloat16), keys, values, spans, channels**-0.5]


def library_attention(q: Tensor, k: Tensor, v: Tensor, spans: Tensor, scale: float) -> list[Tensor]:
    """``attend_spans`` by torch's attention, with a mask."""
    mask = rows.spans_mask(spans, k.shape[1], q.dtype)
    given = (q[None], k[None], v[None], mask)
    return [F.scaled_dot_product_attention(*given, scale=scale, enable_gqa=True)[0]]


def cases(
    hidden: int, vocabularies: Sequence[int], lengths: Sequence[int]
) -> dict[str, tuple[str, Callable[[], list[Any]]]]:
    """Name -> operator, arguments; ``vocabularies``: hot, whole, large; ``lengths``:
    of the texts that are attended to."""
    hot, whole, large = vocabularies
    return {
        "exit_predictor": ("exit_predictor", lambda: exit_arguments(hidden, 0, whole)),
        "exit_predictor, rank 128": ("exit_predictor", lambda: exit_arguments(hidden, 128, whole)),
        f"verify_head, {whole}": ("verify_head", lambda: verify_arguments(hidden, whole)),
        f"verify_head, {large}": ("verify_head", lambda: verify_arguments(hidden, large)),
        f"draft_topk, {hot}": ("draft_topk", lambda: draft_arguments(hidden, hot)),
        f"draft_topk, {whole}": ("draft_topk", lambda: draft_arguments(hidden, whole)),
        **{
            f"linear_rows, {count}": ("linear_rows", partial(rows_arguments, hidden, count))
            for count in (1, 2, 4, 8, 16, 32)
        },
        **{
            f"packed_rows, {kind}, {count}": (
                "packed_rows",
                partial(packed_arguments, hidden, count, kind),
            )
            for kind in ("u4", "u8")
            for count in (1, 16)
        },
        **{
            f"attend_spans, {length}, {count}": (
                "attend_spans",
                partial(attention_arguments, hidden, length, count),
            )
            for length in lengths
            for count in (1, 16)
        },
    }


def captured(function: Callable[..., Any], sets: Sequence[list[Any]]) -> torch.cuda.CUDAGraph:
    """One graph that calls ``function`` with each of ``sets`` in turn."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function(*sets[0])
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for arguments in sets:
            function(*arguments)
    return graph


def microseconds(graph: torch.cuda.CUDAGraph, calls: int) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    repeats = 20
    begin.record()
    for _ in range(repeats):
        graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e3 / (repeats * calls)


def copy_bandwidth() -> float:
    """Bytes a second that a copy within the device reads and writes."""
    source = torch.empty(2**30, dtype=torch.uint8)
    target = torch.empty_like(source)
    graph = captured(lambda: target.copy_(source), [[]])
    return 2 * source.numel() / statistics.median(microseconds(graph, 1) for _ in range(5)) * 1e6


def outputs(function: Callable[..., Any], arguments: list[Any]) -> list[Tensor]:
    result = function(*arguments)
    return [result] if isinstance(result, Tensor) else list(result)


def difference(found: list[Tensor], expected: list[Tensor]) -> str:
    """How the outputs differ, or ""."""
    for index, (a, b) in enumerate(zip(found, expected, strict=True)):
        if not b.numel():
            continue
        if a.is_floating_point():
            limit = 2e-2 if a.dtype == torch.bfloat16 else 2e-3
            if not torch.allclose(a.float(), b.float(), atol=limit * float(b.abs().max()) + 1e-6):
                return f"output {index} is off by {float((a.float() - b.float()).abs().max()):.3g}"
        elif not torch.equal(a, b):
            return f"output {index} differs"
    return ""


def forms_of(operator: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The operator through its Triton kernels, and through torch's operators."""
    from eepass.codegen.kernels.register import run_kernels

    others = {
        "linear_rows": rows.linear_rows,
        "packed_rows": packed.packed_rows,
        "attend_spans": library_attention,
    }
    eager = others.get(operator) or getattr(fused, operator)
    return partial(run_kernels, operator), eager


def bytes_of(operator: str, arguments: list[Any]) -> int:
    from eepass.codegen.kernels.launch import Scratch
    from eepass.codegen.kernels.register import LAUNCHES

    made, _ = LAUNCHES[operator](*arguments, scratch=Scratch(arguments[0]))
    return sum(launch.bytes for launch in made)


def check(name: str, operator: str, make: Callable[[], list[Any]]) -> dict[str, Any]:
    """The kernel in the interpreter: its bytes, and whether it is correct."""
    arguments = make()
    triton, eager = forms_of(operator)
    fault = difference(outputs(triton, arguments), outputs(eager, arguments))
    row = {"bytes": bytes_of(operator, arguments), "triton": fault or "right, not timed"}
    print(f"{name:26} {row}", flush=True)
    return row


def measure(name: str, operator: str, make: Callable[[], list[Any]], copy: float) -> dict[str, Any]:
    arguments = make()
    needed = bytes_of(operator, arguments)
    sets = [arguments]
    while len(sets) * needed < L2_BYTES and len(sets) < 64:
        sets.append(make())
    triton, eager = forms_of(operator)
    expected = outputs(eager, arguments)
    forms = {"triton": triton, "eager": eager, "inductor": torch.compile(eager, dynamic=False)}
    row: dict[str, Any] = {"bytes": needed}
    graphs = {}
    for form, function in forms.items():
        try:
            fault = difference(outputs(function, arguments), expected)
            if not fault:
                graphs[form] = captured(function, sets)
        except Exception as error:
            fault = f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
        if fault:
            row[form] = f"no time: {fault}"
    times: dict[str, list[float]] = {form: [] for form in graphs}
    for _ in range(ROUNDS):
        for form, graph in graphs.items():
            times[form].append(microseconds(graph, len(sets)))
    for form, taken in times.items():
        row[form] = round(statistics.median(taken), 2)
    if "triton" in times:
        row["of_copy"] = round(needed / (row["triton"] * 1e-6) / copy, 3)
    print(f"{name:26} {row}", flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args()
    interpreted = options.device == "cpu"
    if not interpreted and not torch.cuda.is_available():
        raise SystemExit("no CUDA device was found; --device cpu only checks, in the interpreter")
    if interpreted:
        # read when triton is imported
        os.environ["TRITON_INTERPRET"] = "1"
    import triton

    torch.manual_seed(0)
    torch.set_default_device(options.device)
    # small where the interpreter runs program after program
    vocabularies = (40, 100, 200) if interpreted else (8192, 32_000, 128_256)
    lengths = (100, 300) if interpreted else (1024, 8192, 32_768)
    todo = cases(options.hidden, vocabularies, lengths)
    result: dict[str, Any] = {
        "torch": torch.__version__, "triton": triton.__version__, "hidden": options.hidden,
    }  # fmt: skip
    with torch.no_grad():
        if interpreted:
            result["device"] = "Triton's interpreter"
            result["kernels"] = {name: check(name, *case) for name, case in todo.items()}
        else:
            result["device"] = torch.cuda.get_device_name()
            copy = result["copy_bytes_per_second"] = copy_bandwidth()
            print(f"{result['device']}: copy {copy / 1e12:.2f} TB/s; µs a call in a CUDA graph")
            result["kernels"] = {name: measure(name, *case, copy) for name, case in todo.items()}
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
