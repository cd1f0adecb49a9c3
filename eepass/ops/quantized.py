"""The ``eepass::`` operators over quantised weights.

A quantised weight [N, K] is plain tensors: ``codes``, int8 [N, K] or uint8 [N, K/2] with two 4-bit
codes a byte; ``scales`` [N, G] in float16, bfloat16 or float32, one for each K/G columns; ``mins``
[N, G] or None. Its value is codes · scales + mins, rounded to the dtype of what it is multiplied
with; 4-bit codes are 0 to 15, and without ``mins`` 8 is zero. In each 64 columns byte j holds
column j in its low half and column j + 32 in its high half.

``dynamic``: the rows of x are rounded to int8 as well, each by its own scale, and products summed
as integers (int8 codes with one scale a row, no ``mins``).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from eepass.ops.exits import draft_logits
from eepass.ops.registry import define

PAIRED = 64
_WEIGHT = "Tensor codes, Tensor scales, Tensor? mins"
_WEIGHTS = "Tensor[] codes, Tensor[] scales, Tensor?[] mins"


def _empty_values(codes: Tensor, dtype: torch.dtype) -> Tensor:
    columns = codes.shape[-1] * (2 if codes.dtype == torch.uint8 else 1)
    return codes.new_empty(*codes.shape[:-1], columns, dtype=dtype)


@define(f"dequantize({_WEIGHT}, ScalarType dtype) -> Tensor", fake=_empty_values)
def dequantize(codes: Tensor, scales: Tensor, mins: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The weight's values [N, K]."""
    if codes.dtype == torch.uint8:
        codes = unpack_int4(codes)
        if mins is None:
            codes = codes.to(torch.int8) - 8
    # wide enough for the products to be exact, as they are in the kernels
    wide = torch.float64 if scales.dtype == torch.float32 else torch.float32
    values = codes.unflatten(-1, (scales.shape[-1], -1)).to(wide) * scales.to(wide)[..., None]
    if mins is not None:
        values = values + mins.to(wide)[..., None]
    return values.float().flatten(-2).to(dtype)


@define(
    f"quantized_linear(Tensor x, {_WEIGHT}, Tensor? bias, bool dynamic) -> Tensor",
    fake=lambda x, codes: x.new_empty(*x.shape[:-1], codes.shape[0]),
)
def quantized_linear(
    x: Tensor, codes: Tensor, scales: Tensor, mins: Tensor | None,
    bias: Tensor | None, dynamic: bool,
) -> Tensor:  # fmt: skip
    """A linear layer: x [..., K] -> [..., N] in the dtype of x."""
    if not dynamic:
        return F.linear(x, dequantize(codes, scales, mins, x.dtype), bias)
    return dynamic_logits(x, codes, scales, bias).to(x.dtype)


@define(
    f"quantized_rows(Tensor x, {_WEIGHTS}, Tensor?[] biases, bool dynamic) -> Tensor[]",
    fake=lambda x, codes: [x.new_empty(x.shape[0], weight.shape[0]) for weight in codes],
)
def quantized_rows(
    x: Tensor, codes: Sequence[Tensor], scales: Sequence[Tensor], mins: Sequence[Tensor | None],
    biases: Sequence[Tensor | None], dynamic: bool,
) -> list[Tensor]:  # fmt: skip
    """Linear layers over the same rows x [R, K] -> [R, N_i]."""
    weights = zip(codes, scales, mins, biases, strict=True)
    return [quantized_linear(x, *weight, dynamic) for weight in weights]


@define(
    f"quantized_logits(Tensor x, {_WEIGHT}, Tensor? bias, bool dynamic) -> Tensor",
    fake=lambda x, codes: x.new_empty(x.shape[0], codes.shape[0], dtype=torch.float32),
)
def quantized_logits(
    x: Tensor, codes: Tensor, scales: Tensor, mins: Tensor | None,
    bias: Tensor | None, dynamic: bool,
) -> Tensor:  # fmt: skip
    """``quantized_linear`` of x [R, K] with its sums left in float32 [R, N]."""
    if dynamic:
        return dynamic_logits(x, codes, scales, bias)
    logits = x.float() @ dequantize(codes, scales, mins, x.dtype).float().T
    return logits if bias is None else logits + bias.float()


@define(
    f"quantized_draft_logits(Tensor z, {_WEIGHT}, Tensor? bias, Tensor draft_ids) -> Tensor",
    fake=lambda z, draft_ids: z.new_empty(draft_ids.shape, dtype=torch.float32),
)
def quantized_draft_logits(
    z: Tensor, codes: Tensor, scales: Tensor, mins: Tensor | None,
    bias: Tensor | None, draft_ids: Tensor,
) -> Tensor:  # fmt: skip
    """``draft_logits`` of a quantised head: only the rows of the draft tokens are read."""
    ids = draft_ids.flatten()
    rows = dequantize(codes[ids], scales[ids], None if mins is None else mins[ids], z.dtype)
    places = torch.arange(ids.numel(), device=z.device).view_as(draft_ids)
    logits = draft_logits(z, rows, None, places)
    return logits if bias is None else logits + bias[draft_ids].float()


@define(
    "dynamic_logits(Tensor x, Tensor codes, Tensor scales, Tensor? bias) -> Tensor",
    fake=lambda x, codes: x.new_empty(*x.shape[:-1], codes.shape[0], dtype=torch.float32),
)
def dynamic_logits(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., K] rounded to int8 row by row, as torchao rounds activations -> float32 [..., N]."""
    rows = x.float()
    step = (rows.abs().amax(-1, keepdim=True) / 127.5).clamp_min(torch.finfo(torch.float32).eps)
    rounded = (rows * (1.0 / step)).round().clamp(-128, 127)
    # integers, exact in float64
    sums = (rounded.double() @ codes.double().T).float()
    y = sums * step * scales[:, 0].float()
    return y if bias is None else y + bias.float()


def pack_int4(codes: Tensor) -> Tensor:
    """Codes 0 to 15 [..., K] -> uint8 [..., K/2], K a multiple of 64."""
    pairs = codes.to(torch.uint8).unflatten(-1, (-1, 2, PAIRED // 2))
    return (pairs[..., 0, :] | (pairs[..., 1, :] << 4)).flatten(-2)


def unpack_int4(packed: Tensor) -> Tensor:
    """The inverse of ``pack_int4``."""
    pairs = packed.unflatten(-1, (-1, PAIRED // 2))
    return torch.stack([pairs & 15, pairs >> 4], -2).flatten(-3)
