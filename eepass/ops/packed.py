"""The ``eepass::`` operators that multiply with packed weights (``eepass.ops.packing``).

``activations`` says how the rows of x are rounded before they are multiplied: ``INT8``, to int8
with a scale for each 32 inputs, or 256 for the K types, as llama.cpp rounds them; ``ROW``, with one
scale for the whole row, as torchao does; ``UNROUNDED``, not at all. Dot products of integers are
exact, and floats are added in one order, so a row has the same bits in whatever company.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from eepass.ops.exits import draft_logits
from eepass.ops.packing import GROUP, K_KINDS, KINDS, SPAN, unpack
from eepass.ops.registry import define

INT8, ROW, UNROUNDED = range(3)
_WEIGHT = "Tensor packed, int form, int outputs"


@define(
    f"packed_linear(Tensor x, {_WEIGHT}, Tensor? bias, int activations) -> Tensor",
    fake=lambda x, outputs: x.new_empty(*x.shape[:-1], outputs),
)
def packed_linear(
    x: Tensor, packed: Tensor, form: int, outputs: int, bias: Tensor | None, activations: int
) -> Tensor:
    """A linear layer: x [..., K] -> [..., outputs] in the dtype of x."""
    rows = x.reshape(-1, x.shape[-1])
    sums = torch.ops.eepass.packed_logits(rows, packed, form, outputs, bias, activations)
    y: Tensor = sums.to(x.dtype)
    return y.view(*x.shape[:-1], outputs)


@define(
    "packed_rows(Tensor x, Tensor[] packed, int[] forms, int[] outputs, Tensor?[] biases,"
    " int activations) -> Tensor[]",
    fake=lambda x, outputs: [x.new_empty(x.shape[0], count) for count in outputs],
)
def packed_rows(
    x: Tensor, packed: Sequence[Tensor], forms: Sequence[int], outputs: Sequence[int],
    biases: Sequence[Tensor | None], activations: int,
) -> list[Tensor]:  # fmt: skip
    """Linear layers over the same rows x [R, K] -> [R, outputs_i]."""
    weights = zip(packed, forms, outputs, biases, strict=True)
    return [packed_logits(x, *weight, activations).to(x.dtype) for weight in weights]


@define(
    f"packed_logits(Tensor x, {_WEIGHT}, Tensor? bias, int activations) -> Tensor",
    fake=lambda x, outputs: x.new_empty(x.shape[0], outputs, dtype=torch.float32),
)
def packed_logits(
    x: Tensor, packed: Tensor, form: int, outputs: int, bias: Tensor | None, activations: int
) -> Tensor:
    """``packed_linear`` of x [R, K] with its sums left in float32 [R, outputs]."""
    values = unpack(packed, form, outputs, None)
    logits = (rounded(x, form, activations).double() @ values.double().T).float()
    return logits if bias is None else logits + bias.float()


@define(
    f"packed_draft_logits(Tensor z, {_WEIGHT}, Tensor? bias, Tensor draft_ids) -> Tensor",
    fake=lambda z, draft_ids: z.new_empty(draft_ids.shape, dtype=torch.float32),
)
def packed_draft_logits(
    z: Tensor, packed: Tensor, form: int, outputs: int, bias: Tensor | None, draft_ids: Tensor
) -> Tensor:
    """``draft_logits`` of a quantised head, z not rounded: only the draft tokens' rows are read."""
    rows = torch.ops.eepass.unpack(packed, form, outputs, draft_ids.reshape(-1))
    places = torch.arange(draft_ids.numel(), device=z.device).view_as(draft_ids)
    logits = draft_logits(z, rows, None, places)
    return logits if bias is None else logits + bias[draft_ids].float()


def rounded(x: Tensor, form: int, activations: int) -> Tensor:
    """x [R, K] as it is multiplied with weights of ``form``, float32."""
    x = x.float()
    if activations == UNROUNDED:
        return x
    if activations == ROW:
        step = row_steps(x)
        return (x * (1 / step)).round().clamp(-128, 127) * step
    size = SPAN if KINDS[form % 256] in K_KINDS else GROUP
    parts = F.pad(x, (0, -x.shape[1] % size)).unflatten(1, (-1, size))
    scale = parts.abs().amax(-1, keepdim=True) / 127
    by = torch.where(scale > 0, 1 / scale, 0)
    return ((parts * by).round() * scale).flatten(1)[:, : x.shape[1]]


def row_steps(x: Tensor) -> Tensor:
    """The scale [R, 1] with which ``ROW`` rounds each row of x [R, K], float32."""
    # torchao's smallest step is float32's epsilon
    smallest = torch.finfo(torch.float32).eps
    return (x.float().abs().amax(-1, keepdim=True) / 127.5).clamp_min(smallest)
