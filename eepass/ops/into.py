"""The fused operators with outputs their caller gives: ``eepass::<name>.into``.

For a step that is captured once and replayed: outputs lie at fixed addresses the runtime knows
(device memory, or pinned host memory for a flag the host waits for), and intermediate results in a
workspace, so that nothing is allocated. ``codegen.kernels.register.workspace_bytes`` says how large
it has to be; the reference implementations need none.

    exit_predictor.into(..., *, probability, probabilities, z, exits, workspace)
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
from eepass.ops.registry import define

OUTPUTS = {
    "exit_predictor": ("probability", "probabilities", "z", "exits"),
    "verify_head": ("token", "known", "logits"),
    "draft_topk": ("scores", "ids"),
}


def _arguments(name: str) -> str:
    """The arguments of operator ``name`` as its schema writes them."""
    schema = str(getattr(torch.ops.eepass, name).default._schema)
    return schema.partition("(")[2].rpartition(") -> ")[0]


def _define_into(name: str, outputs: tuple[str, ...]) -> None:
    reference: Callable[..., Any] = getattr(fused, name)
    buffers_in_schema = ", ".join(f"Tensor(a{i}!) {out}" for i, out in enumerate(outputs))

    @define(
        f"{name}.into({_arguments(name)}, *, {buffers_in_schema}, Tensor(w!) workspace) -> ()",
        fake=lambda: None,
    )
    def into(*arguments: Any, workspace: Tensor, **buffers: Tensor) -> None:
        for out, value in zip(outputs, reference(*arguments), strict=True):
            buffer = buffers[out]
            alike = (buffer.shape, buffer.dtype) == (value.shape, value.dtype)
            if not alike or not buffer.is_contiguous():
                raise ValueError(
                    f"{out}: {buffer.dtype} {list(buffer.shape)}, expected {value.dtype} "
                    f"{list(value.shape)} contiguous"
                )
            buffer.copy_(value)


for _name, _outputs in OUTPUTS.items():
    _define_into(_name, _outputs)


@define(f"fill_kv.table({_arguments('fill_kv')}, Tensor table) -> ()", fake=lambda: None)
def fill_kv_table(*arguments: Any) -> None:
    """``fill_kv`` with the table its kernel reads; the reference implementation needs none."""
    fused.fill_kv(*arguments[:-1])
