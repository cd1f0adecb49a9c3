"""Compile segments of a decoder ahead of time: lowered as for ``CpuCompiler``, then AOTInductor.

Weights are inputs, so a segment's code is the same for all layers and contains no weights. The
operators with C++ kernels are called through C functions (``cpu/shims.cpp``); a layer's call takes
less time than the same code called from Python.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from eepass.codegen.by_structure import Compiled
from eepass.codegen.compiled_code import CompiledCode, code_key
from eepass.codegen.cpu.building import build_kernels, cache_dir, refuse_foreign
from eepass.codegen.cpu.native import open_kernels
from eepass.codegen.lower_cpu import SETTINGS as LOWERING
from eepass.codegen.lower_cpu import ready_to_compile
from eepass.private_names import compile_fx_aot, inductor_config
from eepass.segments import GraphToMake

_operators = torch.ops.eepass
SHIMS = {
    _operators.linear_rows.default: [
        "AOTITorchError aoti_torch_cpu_linear_rows(AtenTensorHandle, const AtenTensorHandle*,"
        " int64_t, const AtenTensorHandle**, int64_t, ...)"
    ],
    _operators.logits_rows.default: [
        "AOTITorchError aoti_torch_cpu_logits_rows(AtenTensorHandle, AtenTensorHandle,"
        " const AtenTensorHandle*, AtenTensorHandle*)"
    ],
    _operators.packed_rows.default: [
        "AOTITorchError aoti_torch_cpu_packed_rows(AtenTensorHandle, const AtenTensorHandle*,"
        " int64_t, const int64_t*, int64_t, const int64_t*, int64_t, const AtenTensorHandle**,"
        " int64_t, int64_t, ...)"
    ],
    _operators.packed_logits.default: [
        "AOTITorchError aoti_torch_cpu_packed_logits(AtenTensorHandle, AtenTensorHandle, int64_t,"
        " int64_t, const AtenTensorHandle*, int64_t, AtenTensorHandle*)"
    ],
    _operators.unpack.default: [
        "AOTITorchError aoti_torch_cpu_unpack(AtenTensorHandle, int64_t, int64_t,"
        " const AtenTensorHandle*, AtenTensorHandle*)"
    ],
    _operators.top_logits.default: [
        "AOTITorchError aoti_torch_cpu_top_logits(AtenTensorHandle, int64_t, ...)"
    ],
    _operators.attend_rows.default: [
        "AOTITorchError aoti_torch_cpu_attend_rows(AtenTensorHandle, AtenTensorHandle,"
        " AtenTensorHandle, AtenTensorHandle, double, AtenTensorHandle*)"
    ],
}
SETTINGS: dict[str, Any] = {
    "aot_inductor.custom_ops_to_c_shims": SHIMS,
    # for debuggers only, and three quarters of a library's size
    "aot_inductor.enable_line_tables": False,
    "aot_inductor.enable_frame_pointer": False,
}
KERNELS = "kernels.so"
# operators that exist wherever torch and the kernels do; others need the package they come from
NAMESPACES = {"aten", "prims", "eepass", "_operator"}


class CannotCompileAhead(ValueError):
    """A graph needs Python code to run; the message says why."""


class AheadCompiler(CompiledCode):
    """Compiles graphs into ``folder``, one file for each structure, and runs them from there.

    Compiled files are cached for later folders. Raises ``KernelsMissing`` where the C++ kernels
    cannot be built.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, {})
        folder.mkdir(parents=True, exist_ok=True)
        library = build_kernels(every=True)
        open_kernels(library)
        shutil.copyfile(library, folder / KERNELS)
        # besides the graph, the code depends on torch, CPU and kernels (the library's name), on
        # settings, and on the number of threads that loops are divided among
        settings = hashlib.sha256(repr(LOWERING).encode())
        home = f"{library.stem}-{settings.hexdigest()[:8]}-{torch.get_num_threads()}"
        self._cache = cache_dir() / "ahead" / home

    def __call__(
        self, graph: Any, structure: str, examples: Sequence[Tensor], *, logits: bool = False
    ) -> Compiled:
        key = code_key(structure, logits)
        if key not in self.files:
            with ready_to_compile(GraphToMake.made(graph), examples, logits) as (lowered, fakes):
                _refuse_foreign_operators(lowered)
                files = _compiled_files(lowered, fakes, self._cache)
            for file in files:
                shutil.copyfile(file, self.folder / f"{key}{file.suffix}")
            self.files[key] = f"{key}.so"
        return super().__call__(graph, structure, examples, logits=logits)


def _compiled_files(lowered: GraphModule, fakes: list[Any], cache: Path) -> list[Path]:
    """The files compiled from ``lowered``: a library, and perhaps a JSON file beside it."""
    shapes = [(tuple(x.shape), tuple(x.stride()), str(x.dtype)) for x in fakes]
    text = repr((lowered.code, shapes, sorted(map(str, SETTINGS.items()))))
    home = cache / hashlib.sha256(text.encode()).hexdigest()[:32]
    if not home.exists():
        home.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=home.parent) as scratch:
            built = Path(scratch) / "build" / "segment.so"
            patches = {name: value for name, value in SETTINGS.items() if _is_setting(name)}
            patches["aot_inductor.output_path"] = str(built)
            compile_fx_aot(lowered, fakes, config_patches=patches)
            complete = Path(scratch) / "complete"
            complete.mkdir()
            # the JSON file describes operators that have no C function
            for file in (built, built.with_suffix(".json")):
                if file.exists():
                    shutil.copyfile(file, complete / file.name)
            # another process may have compiled the same meanwhile
            with contextlib.suppress(OSError):
                os.replace(complete, home)
    files = sorted(home.iterdir())
    refuse_foreign(home, *files)
    return files


def _is_setting(name: str) -> bool:
    return hasattr(inductor_config.aot_inductor, name.partition(".")[2])


def _refuse_foreign_operators(graph: GraphModule) -> None:
    for node in graph.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        namespace = getattr(node.target, "namespace", getattr(node.target, "__module__", ""))
        if node.op != "call_function" or namespace not in NAMESPACES:
            raise CannotCompileAhead(
                f"it calls {node.target}, which is defined in Python code that will be missing"
            )
