"""Weights that torchao quantised: read into plain tensors, or made with it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from eepass.checkpoints.quantized_weights import QuantizedWeight, four_bit, replace_linears
from eepass.errors import InputError

KINDS = ("int8", "int4", "int8-dynamic")
# what --quantize int4 rounds together
GROUP = 32
INT4: torch.dtype = torch.int4  # type: ignore[attr-defined]


def read_quantized(model: Any) -> bool:
    """Turn torchao's weights in ``model``, in place, into layers that can be traced and compiled;
    whether there were any. Raises ``InputError`` for a form that is not known, naming it."""
    weights: dict[str, QuantizedWeight] = {}
    others: list[tuple[torch.nn.Module, str, Any]] = []
    for name, module in model.named_modules():
        for attribute, parameter in module._parameters.items():
            held: Any = parameter
            if held is None or not is_traceable_wrapper_subclass(held):
                continue
            if isinstance(module, torch.nn.Linear) and attribute == "weight":
                weights[name] = _read(name, held)
            elif isinstance(module, torch.nn.Embedding):
                others.append((module, attribute, held))
            else:
                raise InputError(
                    f"{name}.{attribute} is a {type(held).__name__}: of quantised weights "
                    "those of linear layers and embeddings can be used"
                )
    for module, attribute, held in others:
        # only rows of it are read
        plain = torch.nn.Parameter(held.dequantize(), requires_grad=False)
        module._parameters[attribute] = plain
    replace_linears(model, weights)
    return bool(weights)


def quantize(model: Any, kind: str) -> None:
    """Quantise all linear layers of ``model`` in place, the LM head among them, with torchao.

    ``kind``: int8 (a scale a row), int4 (a scale each 32 columns; rows that do not divide stay as
    they are), int8-dynamic (inputs rounded to int8 as well). Raises ``InputError`` where torchao is
    missing or ``kind`` unknown.
    """
    if kind not in KINDS:
        raise InputError(f"quantize={kind!r}: known are {', '.join(KINDS)}")
    if importlib.util.find_spec("torchao") is None:
        raise InputError("quantising needs torchao: pip install 'eepass[quant]'")
    from torchao import quantization as ao

    dynamic = ao.Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)
    configs: dict[str, Callable[[], Any]] = {
        "int8": lambda: ao.Int8WeightOnlyConfig(set_inductor_config=False),
        "int4": lambda: ao.IntxWeightOnlyConfig(INT4, ao.PerGroup(GROUP)),
        "int8-dynamic": lambda: dynamic,
    }

    def chosen(module: torch.nn.Module, name: str) -> bool:
        if not isinstance(module, torch.nn.Linear):
            return False
        whole = type(module.weight) is torch.nn.Parameter
        return whole and (kind != "int4" or module.weight.shape[1] % GROUP == 0)

    ao.quantize_(model, configs[kind](), filter_fn=chosen)
    if not read_quantized(model):
        raise InputError(f"{type(model).__name__} has no linear layers to quantise")


def _read(name: str, weight: Any) -> QuantizedWeight:
    read = READERS.get(type(weight).__name__)
    if read is None:
        raise InputError(
            f"{name}: its weight is a {type(weight).__name__}; of torchao's eepass reads "
            f"{', '.join(READERS)}"
        )
    if getattr(weight, "act_pre_scale", None) is not None:
        raise InputError(f"{name}: its inputs are to be scaled first (AWQ, SmoothQuant), which "
                         "eepass does not do")  # fmt: skip
    try:
        return read(weight)
    except ValueError as error:
        raise InputError(f"{name}: {error}") from error


def _int8(weight: Any) -> QuantizedWeight:
    scales, zero = _by_row(weight.scale, weight), weight.zero_point
    mins = None
    if zero is not None and zero.any():
        mins = -_by_row(zero, weight).float() * scales.float()
    inputs = weight.act_quant_kwargs
    if inputs is None:
        return QuantizedWeight(weight.qdata, scales, mins)
    asked = (type(inputs.granularity).__name__, inputs.mapping_type.name, inputs.reduce_range)
    if asked != ("PerRow", "SYMMETRIC", False) or weight.act_quant_scale is not None:
        raise ValueError("its inputs are rounded otherwise than symmetrically, token by token")
    if mins is not None or scales.shape[1] != 1:
        raise ValueError("its inputs are rounded, and its weights not symmetrically, row by row")
    return QuantizedWeight(weight.qdata, scales, dynamic=True)


def _intx(weight: Any) -> QuantizedWeight:
    if weight.activation_quantization is not None:
        raise ValueError("its inputs are rounded with a zero point, which eepass does not do")
    scales, zero = _by_row(weight.scale, weight), _by_row(weight.zero_point, weight)
    mins = None
    if zero.any():
        mins = -zero.float() * scales.float()
    if weight.target_dtype is not INT4:
        return QuantizedWeight(weight.qdata, scales, mins)
    if mins is not None:
        mins = mins - 8 * scales.float()
    return four_bit(weight.qdata + 8, scales, mins)


def _int4(weight: Any) -> QuantizedWeight:
    """Two signed codes a byte, the even column's in the low half; code · scale + zero point."""
    if weight.activation_dtype != torch.bfloat16:
        raise ValueError(f"its inputs are to be rounded to {weight.activation_dtype}")
    packed = weight.qdata.view(torch.uint8)
    codes = torch.stack([packed & 15, packed >> 4], -1).flatten(-2) ^ 8
    scales, zero = weight.scale.t().float(), weight.zero_point.t().float()
    return four_bit(codes, scales, zero - 8 * scales)


READERS: dict[str, Callable[[Any], QuantizedWeight]] = {
    "Int8Tensor": _int8,
    "IntxUnpackedToInt8Tensor": _intx,
    "Int4Tensor": _int4,
}


def _by_row(numbers: Tensor, weight: Any) -> Tensor:
    """What belongs to blocks of a weight [N, K] as [N, G]: rows that share a block repeat."""
    rows, columns = weight.qdata.shape
    height, width = weight.block_size
    if columns % width or rows % height:
        raise ValueError(f"blocks of {height} x {width} do not divide {rows} x {columns}")
    blocks = numbers.reshape(rows // height, columns // width)
    return blocks.repeat_interleave(height, 0).contiguous()
