"""The fused operators once more, writing where their caller says: ``eepass::<name>.into``.

For a step that is captured once and replayed: outputs lie at fixed addresses the runtime knows
(device memory, or pinned host memory for a flag the host waits for), and what a kernel needs on the
way is cut from a workspace, so that nothing is allocated. ``codegen.kernels.register`` says how
large a workspace is; the meaning here needs none.

    exit_predictor.into(..., *, probability, probabilities, z, exits, workspace)
    path_predictor.into(..., *, path, node, probabilities, z, exits, workspace)
    verify_head.into(..., *, token, known, logits, workspace)
    draft_topk.into(..., *, scores, ids, workspace)
    fill_kv.table(..., table): its outputs are the caches; the table of pointers to them is made
    before (``codegen.kernels.fill_kv.pointer_table``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from eepass.ops import fused
from eepass.ops.registry import define, fake

OUTPUTS = {
    "exit_predictor": ("probability", "probabilities", "z", "exits"),
    "path_predictor": ("path", "node", "probabilities", "z", "exits"),
    "verify_head": ("token", "known", "logits"),
    "draft_topk": ("scores", "ids"),
}


def _arguments(name: str) -> str:
    """The arguments of operator ``name`` as its schema writes them."""
    schema = str(getattr(torch.ops.eepass, name).default._schema)
    return schema.partition("(")[2].rpartition(") -> ")[0]


def _define_into(name: str, outputs: tuple[str, ...]) -> None:
    meaning: Callable[..., Any] = getattr(fused, name)
    given = ", ".join(f"Tensor(a{place}!) {out}" for place, out in enumerate(outputs))

    @define(f"{name}.into({_arguments(name)}, *, {given}, Tensor(w!) workspace) -> ()")
    def into(*arguments: Any, workspace: Tensor, **buffers: Tensor) -> None:
        for out, value in zip(outputs, meaning(*arguments), strict=True):
            buffer = buffers[out]
            alike = (buffer.shape, buffer.dtype) == (value.shape, value.dtype)
            if not alike or not buffer.is_contiguous():
                raise ValueError(
                    f"{out}: {buffer.dtype} {list(buffer.shape)}, expected {value.dtype} "
                    f"{list(value.shape)} contiguous"
                )
            buffer.copy_(value)

    @fake(f"{name}.into")
    def _(*arguments: Any, **buffers: Tensor) -> None:
        return None


for _name, _outputs in OUTPUTS.items():
    _define_into(_name, _outputs)


@define(f"fill_kv.table({_arguments('fill_kv')}, Tensor table) -> ()")
def fill_kv_table(*arguments: Any) -> None:
    """``fill_kv`` with the table that its kernel reads; the meaning does not look at it."""
    fused.fill_kv(*arguments[:-1])


@fake("fill_kv.table")
def _(*arguments: Any) -> None:
    return None
