"""Make the Triton kernels what the fused operators run on CUDA tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

import eepass.ops.into  # noqa: F401  the operators must be defined before kernels are added to them
from eepass.codegen.kernels import (
    draft_topk,
    exit_predictor,
    fill_kv,
    path_predictor,
    verify_head,
)
from eepass.codegen.kernels.launch import Ready, Scratch, run

# what each operator launches, and its outputs
LAUNCHES: Mapping[str, Callable[..., Any]] = {
    "exit_predictor": exit_predictor.launches,
    "verify_head": verify_head.launches,
    "path_predictor": path_predictor.launches,
    "draft_topk": draft_topk.launches,
    "fill_kv": fill_kv.launches,
}
_libraries: dict[str, torch.library.Library] = {}


def register_kernels(ready: Ready | None = None, key: str = "CUDA") -> None:
    """Let tensors of the dispatch key go through the kernels from here on; without it they go
    through the operators' eager definitions.

    ``ready``: kernels that are compiled already (``cubins.Cubins``), taken where they fit; the rest
    Triton compiles on first use. Once registered they stay; a call with others takes those.
    """
    if key in _libraries and ready is None:
        return
    unregister_kernels(key)
    library = torch.library.Library("eepass", "IMPL", key)
    for name, launches in LAUNCHES.items():
        library.impl(name, partial(_call, launches, ready))
        if name != "fill_kv":
            library.impl(f"{name}.into", partial(_call_into, launches, ready))
    library.impl("fill_kv.table", partial(_fill_from_table, ready))
    _libraries[key] = library


def unregister_kernels(key: str = "CUDA") -> None:
    """Back to the eager definitions."""
    if (library := _libraries.pop(key, None)) is not None:
        library._destroy()


def workspace_bytes(name: str, *arguments: Any) -> int:
    """Bytes of workspace that ``eepass::<name>.into`` wants for ``arguments``."""
    scratch = Scratch(arguments[0])
    LAUNCHES[name](*arguments, scratch=scratch)
    return scratch.bytes


def _call(launches: Callable[..., Any], ready: Ready | None, *arguments: Any) -> Any:
    made, outputs = launches(*arguments, scratch=Scratch(arguments[0]))
    run(made, ready)
    return outputs or None


def _call_into(
    launches: Callable[..., Any],
    ready: Ready | None,
    *arguments: Any,
    workspace: Tensor,
    **buffers: Tensor,
) -> None:
    made, _ = launches(*arguments, scratch=Scratch(arguments[0], workspace), given=buffers)
    run(made, ready)


def _fill_from_table(ready: Ready | None, *arguments: Any) -> None:
    *given, table = arguments
    made, _ = fill_kv.launches(*given, scratch=Scratch(arguments[0]), table=table)
    run(made, ready)
