"""Register the Triton kernels as what the fused operators run on CUDA tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

import eepass.ops.into  # noqa: F401  the operators must be defined before kernels are added to them
from eepass.codegen.kernels import (
    attend_rows,
    draft_topk,
    exit_predictor,
    fill_kv,
    linear_rows,
    packed_rows,
    verify_head,
)
from eepass.codegen.kernels.launch import CompiledKernels, Scratch, run
from eepass.ops import packed

# by operator, the function that makes its launches and outputs
LAUNCHES: Mapping[str, Callable[..., Any]] = {
    "exit_predictor": exit_predictor.launches,
    "verify_head": verify_head.launches,
    "draft_topk": draft_topk.launches,
    "fill_kv": fill_kv.launches,
    "linear_rows": linear_rows.launches,
    "packed_rows": packed_rows.launches,
    "packed_logits": packed_rows.logit_launches,
    "attend_rows": attend_rows.launches,
    "attend_spans": attend_rows.span_launches,
}
# those that write into buffers of their caller's
INTO = ("exit_predictor", "verify_head", "draft_topk")
_libraries: dict[str, torch.library.Library] = {}


def register_kernels(compiled: CompiledKernels | None = None, key: str = "CUDA") -> None:
    """Run the fused operators through the kernels for tensors of dispatch key ``key``; until then
    they run their reference implementations.

    ``compiled``: kernels compiled ahead of time (``cubins.Cubins``), used where they fit; the rest
    Triton compiles on first use. Registering again without ``compiled`` changes nothing; with it,
    those kernels replace the earlier ones.
    """
    if key in _libraries and compiled is None:
        return
    unregister_kernels(key)
    library = torch.library.Library("eepass", "IMPL", key)
    for name in LAUNCHES:
        run_one = _run_packed if name.startswith("packed_") else run_kernels
        library.impl(name, partial(run_one, name, compiled=compiled))
        if name in INTO:
            library.impl(f"{name}.into", partial(_run_into, name, compiled))
    library.impl("fill_kv.table", partial(_fill_from_table, compiled))
    _libraries[key] = library


def unregister_kernels(key: str = "CUDA") -> None:
    """Back to the reference implementations."""
    if (library := _libraries.pop(key, None)) is not None:
        library._destroy()


def workspace_bytes(name: str, *arguments: Any) -> int:
    """Bytes of workspace that ``eepass::<name>.into`` needs for ``arguments``."""
    scratch = Scratch(arguments[0])
    LAUNCHES[name](*arguments, scratch=scratch)
    return scratch.bytes


def run_kernels(name: str, *arguments: Any, compiled: CompiledKernels | None = None) -> Any:
    """``eepass::<name>`` through its kernels, on the device of its arguments."""
    launches, outputs = LAUNCHES[name](*arguments, scratch=Scratch(arguments[0]))
    run(launches, compiled)
    return outputs if len(outputs) else None


def _run_packed(name: str, *arguments: Any, compiled: CompiledKernels | None = None) -> Any:
    """As ``run_kernels``; the reference implementation for weights of other kinds."""
    x, _, forms = arguments[:3]
    forms = [forms] if isinstance(forms, int) else forms
    if all(packed_rows.fits(form, len(x)) for form in forms):
        return run_kernels(name, *arguments, compiled=compiled)
    return getattr(packed, name)(*arguments)


def _run_into(
    name: str,
    compiled: CompiledKernels | None,
    *arguments: Any,
    workspace: Tensor,
    **buffers: Tensor,
) -> None:
    scratch = Scratch(arguments[0], workspace)
    run(LAUNCHES[name](*arguments, scratch=scratch, out=buffers)[0], compiled)


def _fill_from_table(compiled: CompiledKernels | None, *arguments: Any) -> None:
    *fill, table = arguments
    run(fill_kv.launches(*fill, scratch=Scratch(arguments[0]), table=table)[0], compiled)
