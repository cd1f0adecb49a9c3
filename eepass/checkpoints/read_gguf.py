"""Keep a GGUF file's quantised weights as they are in the model that was made from it.

The model's linear layers are found in the file by their values: a weight is the file's tensor with
its rows in some order (converters permute them), or it is none. So no table of names is needed,
and what is kept has the very values that were loaded.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from eepass.checkpoints.quantized_weights import PARTS, QuantizedWeight, four_bit, replace_linears

# values in a block, and in a block of a K type
SMALL, LARGE = 32, 256


def keep_quantized(model: Any, file: Path, cache: Path) -> str:
    """Give ``model``, loaded from what was converted of ``file``, the file's quantised weights.

    What was found is kept in the folder ``cache``. Returns what stays dequantised, in words, or "".
    """
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    kept = cache / f"quantized-{dtype}.safetensors"
    if kept.exists():
        weights, left = _read(kept)
    else:
        weights, left = kept_weights(model, file)
        _write(kept, weights, left)
    replace_linears(model, weights)
    return ", ".join(f"{count} tensors of {kind} dequantised" for kind, count in left.items())


def _write(file: Path, weights: Mapping[str, QuantizedWeight], left: Mapping[str, int]) -> None:
    tensors = {
        f"{name}.{part}": tensor.clone()
        for name, weight in weights.items()
        for part in PARTS
        if (tensor := getattr(weight, part)) is not None
    }
    scratch = file.with_name(f".{file.name}.{os.getpid()}.part")
    save_file(tensors, scratch, {"left": json.dumps(left)})
    os.replace(scratch, file)


def _read(file: Path) -> tuple[dict[str, QuantizedWeight], dict[str, int]]:
    with safe_open(file, "pt") as stored:
        parts: dict[str, dict[str, Tensor]] = {}
        for key in stored.keys():  # noqa: SIM118  it is no mapping
            name, _, part = key.rpartition(".")
            parts.setdefault(name, {})[part] = stored.get_tensor(key)
        left = json.loads(stored.metadata()["left"])
    weights = {
        name: QuantizedWeight(made["codes"], made["scales"], made.get("mins"))
        for name, made in parts.items()
    }
    return weights, left


def kept_weights(model: Any, file: Path) -> tuple[dict[str, QuantizedWeight], dict[str, int]]:
    """The quantised weights of ``model``'s linear layers by name, as ``file`` has them; and by type
    how many of the file's tensors stay dequantised: no kernel reads them, or no layer has them."""
    from gguf import GGUFReader

    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    waiting: dict[tuple[Any, ...], list[str]] = {}
    for name, linear in linears.items():
        waiting.setdefault(_key(linear.weight), []).append(name)
    found: dict[str, QuantizedWeight] = {}
    left: Counter[str] = Counter()
    for tensor in GGUFReader(file).tensors:
        kind = tensor.tensor_type.name
        if kind in ("F32", "F16", "BF16"):
            continue
        read = READERS.get(kind)
        weight = read(np.asarray(tensor.data)) if read and tensor.data.ndim == 2 else None
        names = []
        if weight is not None:
            dtype = next(iter(linears.values())).weight.dtype
            values = weight.values(dtype)
            names = waiting.get(_key(values), [])
            for name in names:
                found[name] = _in_order(weight, values, linears[name].weight)
        if not names:
            left[kind] += 1
    return found, dict(left)


def _key(weight: Tensor) -> tuple[Any, ...]:
    """Equal for weights with the same rows in any order."""
    return (*weight.shape, weight.dtype, int(_row_hashes(weight).sum()))


def _row_hashes(weight: Tensor) -> Tensor:
    bits = weight.detach().view(torch.int16)
    factors = torch.randint(
        -(2**62), 2**62, (bits.shape[1],), generator=torch.Generator().manual_seed(0)
    )
    # int64 wraps around, which is what a hash wants
    return torch.cat([(part.long() * factors).sum(1) for part in bits.split(4096)])


def _in_order(weight: QuantizedWeight, values: Tensor, wanted: Tensor) -> QuantizedWeight:
    if torch.equal(values, wanted):
        return weight
    here, there = _row_hashes(values).sort(), _row_hashes(wanted).sort()
    order = torch.empty_like(here.indices)
    order[there.indices] = here.indices
    if not torch.equal(values[order], wanted):
        raise ValueError("two weights with the same hash")
    mins = None if weight.mins is None else weight.mins[order]
    return QuantizedWeight(weight.codes[order], weight.scales[order], mins)


def _q8_0(data: np.ndarray) -> QuantizedWeight:
    blocks = data.reshape(len(data), -1, 2 + SMALL)
    return QuantizedWeight(_codes(blocks[..., 2:].view(np.int8)), _half(blocks[..., :2]))


def _q4_0(data: np.ndarray) -> QuantizedWeight:
    blocks = data.reshape(len(data), -1, 2 + SMALL // 2)
    return four_bit(_halves(blocks[..., 2:]), _half(blocks[..., :2]))


def _q4_1(data: np.ndarray) -> QuantizedWeight:
    blocks = data.reshape(len(data), -1, 4 + SMALL // 2)
    return four_bit(_halves(blocks[..., 4:]), _half(blocks[..., :2]), _half(blocks[..., 2:4]))


def _q4_k(data: np.ndarray) -> QuantizedWeight:
    """Scales and mins of 32 columns are products with 6-bit numbers: exact in float32 alone."""
    from gguf.quants import Q4_K

    blocks = data.reshape(len(data), -1, 16 + LARGE // 2)
    steps = [_half(blocks[..., at : at + 2]).float()[..., None] for at in (0, 2)]
    packed = np.ascontiguousarray(blocks[..., 4:16]).reshape(-1, 12)
    scale, low = (torch.from_numpy(x).view(len(data), -1, 8) for x in Q4_K.get_scale_min(packed))
    codes = _halves(blocks[..., 16:].reshape(len(data), -1, SMALL))
    return four_bit(codes, (steps[0] * scale).flatten(1), -(steps[1] * low).flatten(1))


def _q6_k(data: np.ndarray) -> QuantizedWeight:
    """6 bits, 4 of a value in one place and 2 in another; a byte each here, 16 to a scale."""
    blocks = data.reshape(len(data), -1, 2 + LARGE + LARGE // 4 - LARGE // 2 + LARGE // 16)
    low = blocks[..., :128].reshape(len(data), -1, 2, 1, 64)
    high = blocks[..., 128:192].reshape(len(data), -1, 2, 1, 32)
    low = np.concatenate([low & 15, low >> 4], 3).reshape(len(data), -1, 2, 4, 32)
    high = np.concatenate([high >> shift & 3 for shift in (0, 2, 4, 6)], 3)
    codes = (low | high << 4).astype(np.int8) - 32
    small = torch.from_numpy(np.ascontiguousarray(blocks[..., 192:208]).view(np.int8))
    scales = _half(blocks[..., 208:]).float()[..., None] * small.float()
    return QuantizedWeight(_codes(codes), scales.flatten(1))


READERS: dict[str, Callable[[np.ndarray], QuantizedWeight]] = {
    "Q8_0": _q8_0,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q4_K": _q4_k,
    "Q6_K": _q6_k,
}


def _codes(blocks: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(blocks).reshape(len(blocks), -1))


def _halves(blocks: np.ndarray) -> Tensor:
    """Each block's low halves, then its high ones."""
    return _codes(np.concatenate([blocks & 15, blocks >> 4], -1))


def _half(blocks: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(blocks).view(np.float16))[..., 0]
