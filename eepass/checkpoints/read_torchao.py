"""Read the weights that torchao quantised into plain tensors, or quantise a model with torchao."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from eepass.checkpoints.quantized_weights import QuantizedWeight, grouped, replace_linears
from eepass.errors import InputError
from eepass.ops.packed import INT8
from eepass.ops.packing import GROUP
from eepass.private_names import is_traceable_wrapper_subclass

KINDS = ("int8", "int4", "int8-dynamic")
# columns that share a scale with --quantize int4, and that a layer's width is a multiple of
INT4: torch.dtype = torch.int4  # type: ignore[attr-defined]


def read_quantized(model: Any, activations: int = INT8) -> bool:
    """Replace layers of ``model`` with torchao's weights, in place, by ones that can be traced and
    compiled; whether there were any. Raises ``InputError`` naming a format that cannot be read."""
    weights: dict[str, QuantizedWeight] = {}
    embeddings: list[tuple[torch.nn.Module, str, Any]] = []
    for name, module in model.named_modules():
        for attribute, value in module._parameters.items():
            parameter: Any = value
            if parameter is None or not is_traceable_wrapper_subclass(parameter):
                continue
            if isinstance(module, torch.nn.Linear) and attribute == "weight":
                weights[name] = _read(name, parameter)
            elif isinstance(module, torch.nn.Embedding):
                embeddings.append((module, attribute, parameter))
            else:
                raise InputError(
                    f"{name}.{attribute} is a {type(parameter).__name__}: only linear layers and "
                    "embeddings may be quantised"
                )
    for module, attribute, parameter in embeddings:
        # dequantised: only rows of it are read
        plain = torch.nn.Parameter(parameter.dequantize(), requires_grad=False)
        module._parameters[attribute] = plain
    replace_linears(model, weights, activations)
    return bool(weights)


def quantize(model: Any, kind: str, activations: int = INT8) -> None:
    """Quantise all linear layers of ``model`` in place, including the LM head, with torchao.

    ``kind``: int8 (a scale per row), int4 (a scale per 32 columns), int8-dynamic (inputs rounded
    with a scale a row). Layers whose width is no multiple of 32 stay as they are. Raises
    ``InputError`` where torchao is missing or ``kind`` unknown.
    """
    if kind not in KINDS:
        raise InputError(f"quantize={kind!r}: known are {', '.join(KINDS)}")
    if importlib.util.find_spec("torchao") is None:
        raise InputError("quantising needs torchao: pip install 'eepass[quant]'")
    from torchao import quantization as ao

    configs = {
        "int8": ao.Int8WeightOnlyConfig(set_inductor_config=False),
        "int4": ao.IntxWeightOnlyConfig(INT4, ao.PerGroup(GROUP)),
        "int8-dynamic": ao.Int8DynamicActivationInt8WeightConfig(set_inductor_config=False),
    }

    def is_quantized(module: torch.nn.Module, name: str) -> bool:
        if not isinstance(module, torch.nn.Linear):
            return False
        plain = type(module.weight) is torch.nn.Parameter
        return plain and module.weight.shape[1] % GROUP == 0

    ao.quantize_(model, configs[kind], filter_fn=is_quantized)
    if not read_quantized(model, activations):
        raise InputError(f"{type(model).__name__} has no linear layers to quantise")


def _read(name: str, weight: Any) -> QuantizedWeight:
    read = READERS.get(type(weight).__name__)
    if read is None:
        raise InputError(
            f"{name}: its weight is a {type(weight).__name__}; eepass reads torchao's "
            f"{', '.join(READERS)}"
        )
    if getattr(weight, "act_pre_scale", None) is not None:
        raise InputError(f"{name}: its inputs have to be scaled first (AWQ, SmoothQuant), which "
                         "eepass does not do")  # fmt: skip
    try:
        return read(weight)
    except ValueError as error:
        raise InputError(f"{name}: {error}") from error


def _int8(weight: Any) -> QuantizedWeight:
    scales, mins = _scales_and_mins(weight)
    inputs = weight.act_quant_kwargs
    if inputs is None:
        return _signed(weight.qdata, scales, mins)
    rounding = (type(inputs.granularity).__name__, inputs.mapping_type.name, inputs.reduce_range)
    if rounding != ("PerRow", "SYMMETRIC", False) or weight.act_quant_scale is not None:
        raise ValueError("its inputs are not rounded symmetrically, token by token")
    if mins.any() or scales.shape[1] != 1:
        raise ValueError("its inputs are rounded, but its weights not symmetrically, row by row")
    return _signed(weight.qdata, scales, mins, dynamic=True)


def _intx(weight: Any) -> QuantizedWeight:
    if weight.activation_quantization is not None:
        raise ValueError("its inputs are rounded with a zero point, which eepass does not do")
    scales, mins = _scales_and_mins(weight)
    if weight.target_dtype is not INT4:
        return _signed(weight.qdata, scales, mins)
    return grouped((weight.qdata + 8).to(torch.uint8), scales, mins - 8 * scales, 4)


def _signed(codes: Tensor, scales: Tensor, mins: Tensor, dynamic: bool = False) -> QuantizedWeight:
    """A weight of codes int8."""
    return grouped(codes.view(torch.uint8) ^ 128, scales, mins - 128 * scales, 8, dynamic)


def _int4(weight: Any) -> QuantizedWeight:
    """Two signed codes a byte, the even column's in the low half; code * scale + zero point."""
    if weight.activation_dtype != torch.bfloat16:
        raise ValueError(f"its inputs have to be rounded to {weight.activation_dtype}")
    packed = weight.qdata.view(torch.uint8)
    codes = torch.stack([packed & 15, packed >> 4], -1).flatten(-2) ^ 8
    scales, zero = weight.scale.t().float(), weight.zero_point.t().float()
    return grouped(codes, scales, zero - 8 * scales, 4)


READERS: dict[str, Callable[[Any], QuantizedWeight]] = {
    "Int8Tensor": _int8,
    "IntxUnpackedToInt8Tensor": _intx,
    "Int4Tensor": _int4,
}


def _scales_and_mins(weight: Any) -> tuple[Tensor, Tensor]:
    """Scales and mins float32 [N, G], zero where there is no zero point: (code - zero) * scale."""
    scales, zero = _by_row(weight.scale, weight).float(), weight.zero_point
    if zero is None:
        return scales, torch.zeros_like(scales)
    return scales, -_by_row(zero, weight).float() * scales


def _by_row(numbers: Tensor, weight: Any) -> Tensor:
    """Numbers of the blocks of a weight [N, K] as [N, G]: rows of the same block repeat them."""
    rows, columns = weight.qdata.shape
    height, width = weight.block_size
    if columns % width or rows % height:
        raise ValueError(f"blocks of {height} x {width} do not divide {rows} x {columns}")
    blocks = numbers.reshape(rows // height, columns // width)
    return blocks.repeat_interleave(height, 0).contiguous()
