"""Register the Triton kernels as what the fused operators run on CUDA tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

import eepass.ops.fused
import eepass.ops.rows  # noqa: F401  the operators must be defined before kernels are added to them
from eepass.codegen.kernels import (
    attend_rows,
    draft_topk,
    exit_predictor,
    linear_rows,
    packed_rows,
    verify_head,
)
from eepass.codegen.kernels.launch import Scratch, run
from eepass.ops import packed

# by operator, the function that makes its launches and outputs
LAUNCHES: Mapping[str, Callable[..., Any]] = {
    "exit_predictor": exit_predictor.launches,
    "verify_head": verify_head.launches,
    "draft_topk": draft_topk.launches,
    "linear_rows": linear_rows.launches,
    "packed_rows": packed_rows.launches,
    "packed_logits": packed_rows.logit_launches,
    "attend_rows": attend_rows.launches,
    "attend_spans": attend_rows.span_launches,
}
_libraries: dict[str, torch.library.Library] = {}


def register_kernels(key: str = "CUDA") -> None:
    """Run the fused operators through the kernels for tensors of dispatch key ``key``; until then
    they run their reference implementations. Triton compiles a kernel on its first use."""
    if key in _libraries:
        return
    library = torch.library.Library("eepass", "IMPL", key)
    for name in LAUNCHES:
        run_one = _run_packed if name.startswith("packed_") else run_kernels
        library.impl(name, partial(run_one, name))
    _libraries[key] = library


def unregister_kernels(key: str = "CUDA") -> None:
    """Back to the reference implementations."""
    if (library := _libraries.pop(key, None)) is not None:
        library._destroy()


def run_kernels(name: str, *arguments: Any) -> Any:
    """``eepass::<name>`` through its kernels, on the device of its arguments."""
    launches, outputs = LAUNCHES[name](*arguments, scratch=Scratch(arguments[0]))
    run(launches)
    return outputs


def _run_packed(name: str, *arguments: Any) -> Any:
    """As ``run_kernels``; the reference implementation for weights of other kinds."""
    x, _, forms = arguments[:3]
    forms = [forms] if isinstance(forms, int) else forms
    if all(packed_rows.fits(form, len(x)) for form in forms):
        return run_kernels(name, *arguments)
    return getattr(packed, name)(*arguments)
