"""compressed-tensors, as llm-compressor writes it: ``pack-quantized`` and ``int-quantized``.

pack-quantized: ``weight_packed`` int32 [N, K·bits/32] holds codes along the inputs from the lowest
bits, ``weight_zero_point`` [N·bits/32, G] along the outputs, both with half their range added to
make them unsigned; ``weight_shape`` is [N, K]. int-quantized: ``weight`` and ``weight_zero_point``
are int8. In both ``weight_scale`` is [N, G], and the weight is (code - zero) * scale.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from eepass.checkpoints.formats.packing import (
    groups_of,
    refuse_reordered,
    unpack,
    whole_number,
    words_for,
)
from eepass.checkpoints.formats.stored import StoredTensors
from eepass.checkpoints.quantized_weights import QuantizedWeight, grouped
from eepass.errors import InputError

PACKED, BYTES = "pack-quantized", ("int-quantized", "naive-quantized")


@dataclass(frozen=True, slots=True)
class Scheme:
    """How the layers of one config group are quantised. ``targets``: names of layers, patterns for
    them after ``re:``, or the class Linear. ``group``: how many inputs share a scale, -1 for all.
    ``dynamic``: inputs are rounded to int8, token by token."""

    targets: tuple[str, ...]
    packed: bool
    bits: int
    group: int
    symmetric: bool
    dynamic: bool

    @property
    def half(self) -> int:
        """What makes codes unsigned, and the zero of symmetric ones."""
        return 1 << (self.bits - 1)


@dataclass(frozen=True, slots=True)
class CompressedTensors:
    """The schemes of a checkpoint, by config group."""

    schemes: Mapping[str, Scheme]
    marks: ClassVar = ("weight_packed", "weight_scale")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> CompressedTensors:
        """Raises ``InputError`` for what is not read."""
        for part in ("kv_cache_scheme", "transform_config"):
            if config.get(part):
                raise InputError(f"compressed-tensors with a {part}, which eepass does not read")
        sparse = config.get("sparsity_config") or {}
        if sparse and sparse.get("format", "dense") != "dense":
            raise InputError(f"compressed-tensors' sparse format {sparse['format']}")
        groups = config.get("config_groups")
        if not isinstance(groups, Mapping) or not all(isinstance(x, dict) for x in groups.values()):
            raise InputError("quantization_config: config_groups is no table of schemes")
        return cls({name: _scheme(name, group, config) for name, group in groups.items()})

    def read(self, stored: StoredTensors, layer: str, outputs: int, inputs: int) -> QuantizedWeight:
        """The weight [outputs, inputs] of a linear layer."""
        scheme = self._for(layer)
        groups = groups_of(layer, scheme.group, inputs)
        codes, zeros = _codes_and_zeros(stored, layer, scheme, (outputs, inputs, groups))
        if (name := f"{layer}.weight_g_idx") in stored:
            order = stored.take(name, (inputs,), torch.int32, torch.int64)
            refuse_reordered(name, order, groups)
        scales = stored.take_scales(f"{layer}.weight_scale", (outputs, groups))
        return grouped(codes, scales, -(zeros * scales), scheme.bits, scheme.dynamic)

    def _for(self, layer: str) -> Scheme:
        for scheme in self.schemes.values():
            if any(_names(target, layer) for target in scheme.targets):
                return scheme
        for scheme in self.schemes.values():
            if "Linear" in scheme.targets:
                return scheme
        raise InputError(f"{layer} is quantised, but no config group is for it")


def _names(target: str, layer: str) -> bool:
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), layer) is not None
    return target == layer


def _scheme(name: str, group: Mapping[str, Any], config: Mapping[str, Any]) -> Scheme:
    """The scheme of a config group; raises ``InputError`` for one that is not read."""
    weights, layout = group.get("weights") or {}, group.get("format") or config.get("format")
    kind, bits = weights.get("type", "int"), whole_number(weights, "num_bits", default=8)
    size = whole_number(weights, "group_size", default=0)
    strategy = weights.get("strategy") or {-1: "channel", 0: "tensor"}.get(size, "group")
    if kind != "int" or layout not in (PACKED, *BYTES):
        what = f"{layout} weights of type {kind}"
    elif bits not in (4, 8) or (layout != PACKED and bits != 8):
        what = f"{layout} weights of {bits} bits"
    elif strategy not in ("group", "channel") or (strategy == "group" and size < 1):
        what = f"scales for a {strategy} of {size} inputs"
    elif group.get("output_activations"):
        what = "rounded outputs"
    else:
        targets = tuple(str(target) for target in group.get("targets") or ())
        size = size if strategy == "group" else -1
        symmetric = bool(weights.get("symmetric", True))
        scheme = Scheme(targets, layout == PACKED, bits, size, symmetric, False)
        inputs = group.get("input_activations")
        return replace(scheme, dynamic=True) if _rounds_inputs(name, inputs, scheme) else scheme
    raise InputError(
        f"compressed-tensors' {name}: {what}; eepass reads pack-quantized weights of 4 or 8 bits "
        "and int-quantized ones of 8, with a scale for a group or a channel"
    )


def _rounds_inputs(name: str, inputs: Mapping[str, Any] | None, scheme: Scheme) -> bool:
    """Whether inputs are rounded token by token; ``InputError`` where in a way no kernel does."""
    if not inputs:
        return False
    wanted = {
        "num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True,
    }  # fmt: skip
    plain = all(inputs.get(key) == value for key, value in wanted.items())
    if not (plain and scheme.bits == 8 and scheme.group == -1 and scheme.symmetric):
        raise InputError(
            f"compressed-tensors' {name}: inputs are rounded; eepass does so to int8, token by "
            "token and symmetrically, with symmetric weights of 8 bits and a scale for a channel"
        )
    return True


def _codes_and_zeros(
    stored: StoredTensors, layer: str, scheme: Scheme, sizes: tuple[int, int, int]
) -> tuple[Tensor, Tensor]:
    """Unsigned codes [N, K] and their zeros, [N, G] or one; ``sizes``: N, K, G."""
    outputs, inputs, groups = sizes
    bits, name = scheme.bits, f"{layer}.weight_zero_point"
    whole = scheme.symmetric and name not in stored
    if not scheme.packed:
        codes = stored.take(f"{layer}.weight", (outputs, inputs), torch.int8)
        zeros = torch.zeros(1) if whole else stored.take(name, (outputs, groups), torch.int8)
        return codes.view(torch.uint8) ^ scheme.half, zeros.float() + scheme.half
    if (shape_name := f"{layer}.weight_shape") in stored:
        shape = stored.take(shape_name, (2,), torch.int64, torch.int32).tolist()
        if shape != [outputs, inputs]:
            raise InputError(f"{shape_name} is {shape}, the model's layer {[outputs, inputs]}")
    words = stored.take(f"{layer}.weight_packed", (outputs, words_for(inputs, bits)), torch.int32)
    codes = unpack(words, bits, inputs)
    if whole:
        return codes, torch.tensor(scheme.half)
    words = stored.take(name, (words_for(outputs, bits), groups), torch.int32)
    return codes, unpack(words.t(), bits, outputs).t()
