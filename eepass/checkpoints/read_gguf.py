"""Give a model that was converted from a GGUF file the file's own quantised weights.

Values tell which tensor of the file belongs to which linear layer: the same rows, in some order
(converters permute them). So no table of names is needed, and the quantised weights have exactly
the values that were loaded.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from eepass.checkpoints.quantized_weights import QuantizedWeight, four_bit, replace_linears
from eepass.files import write_tensors_atomically

# values in a block, and in a block of a K type
SMALL, LARGE = 32, 256


def keep_quantized(model: Any, file: Path, cache: Path) -> str:
    """Give ``model``, which was converted from ``file``, the file's quantised weights.

    The result is cached in the folder ``cache``. Returns, for the user, which tensors stay
    dequantised, or "".
    """
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    cached = cache / f"quantized-{dtype}.safetensors"
    if cached.exists():
        weights, left = _read(cached)
    else:
        weights, left = find_weights(model, file)
        _write(cached, weights, left)
    replace_linears(model, weights)
    return ", ".join(f"{count} tensors of {kind} dequantised" for kind, count in left.items())


def _write(file: Path, weights: Mapping[str, QuantizedWeight], left: Mapping[str, int]) -> None:
    # two layers may share tensors, which one file cannot hold
    tensors = {
        f"{name}.{part}": tensor.clone()
        for name, weight in weights.items()
        for part, tensor in weight.parts.items()
    }
    write_tensors_atomically(file, tensors, {"left": json.dumps(left)})


def _read(file: Path) -> tuple[dict[str, QuantizedWeight], dict[str, int]]:
    parts: dict[str, dict[str, Any]] = {}
    with safe_open(file, "pt") as stored:
        for key in stored.keys():  # noqa: SIM118  it is no mapping
            name, _, part = key.rpartition(".")
            parts.setdefault(name, {})[part] = stored.get_tensor(key)
        left = json.loads(stored.metadata()["left"])
    return {name: QuantizedWeight(**tensors) for name, tensors in parts.items()}, left


def find_weights(model: Any, file: Path) -> tuple[dict[str, QuantizedWeight], dict[str, int]]:
    """The weights of ``model``'s linear layers by name, as ``file`` has them quantised; and by type
    the number of the file's tensors that stay dequantised: no kernel reads the type, or no layer
    has the values."""
    from gguf import GGUFReader

    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    by_key: dict[tuple[Any, ...], list[str]] = {}
    for name, linear in linears.items():
        by_key.setdefault(_key(linear.weight), []).append(name)
    found: dict[str, QuantizedWeight] = {}
    left: Counter[str] = Counter()
    for tensor in GGUFReader(file).tensors:
        kind = tensor.tensor_type.name
        if kind in ("F32", "F16", "BF16"):
            continue
        read = READERS.get(kind)
        weight = read(np.asarray(tensor.data)) if read and tensor.data.ndim == 2 else None
        names: list[str] = []
        if weight is not None:
            values = weight.values(next(iter(linears.values())).weight.dtype)
            names = by_key.get(_key(values), [])
            for name in names:
                found[name] = _in_order(weight, values, linears[name].weight)
        if not names:
            left[kind] += 1
    return found, dict(left)


def _key(weight: Tensor) -> tuple[Any, ...]:
    """The same for weights with the same rows, in whatever order."""
    return (*weight.shape, weight.dtype, int(_row_hashes(weight).sum()))


def _row_hashes(weight: Tensor) -> Tensor:
    bits = weight.detach().view(torch.int16)
    factors = torch.randint(
        -(2**62), 2**62, (bits.shape[1],), generator=torch.Generator().manual_seed(0)
    )
    # int64 overflow wraps around, as it should in a hash
    return torch.cat([(part.long() * factors).sum(1) for part in bits.split(4096)])


def _in_order(weight: QuantizedWeight, values: Tensor, target: Tensor) -> QuantizedWeight:
    """``weight``, which has the ``values``, with its rows in the order of ``target``."""
    if torch.equal(values, target):
        return weight
    here, there = _row_hashes(values).sort(), _row_hashes(target).sort()
    order = torch.empty_like(here.indices)
    order[there.indices] = here.indices
    if not torch.equal(values[order], target):
        raise ValueError("two weights with the same hash")
    return weight.map(lambda part: part[order])


def _q8_0(data: np.ndarray) -> QuantizedWeight:
    blocks = data.reshape(len(data), -1, 2 + SMALL)
    return QuantizedWeight(_codes(blocks[..., 2:].view(np.int8)), _half(blocks[..., :2]))


def _q4_0(data: np.ndarray) -> QuantizedWeight:
    blocks = data.reshape(len(data), -1, 2 + SMALL // 2)
    return four_bit(_nibbles(blocks[..., 2:]), _half(blocks[..., :2]))


def _q4_1(data: np.ndarray) -> QuantizedWeight:
    blocks = data.reshape(len(data), -1, 4 + SMALL // 2)
    return four_bit(_nibbles(blocks[..., 4:]), _half(blocks[..., :2]), _half(blocks[..., 2:4]))


def _q4_k(data: np.ndarray) -> QuantizedWeight:
    """Scales and mins of 32 columns are products with 6-bit numbers, exact only in float32."""
    from gguf.quants import Q4_K

    blocks = data.reshape(len(data), -1, 16 + LARGE // 2)
    steps = [_half(blocks[..., at : at + 2]).float()[..., None] for at in (0, 2)]
    packed = np.ascontiguousarray(blocks[..., 4:16]).reshape(-1, 12)
    scale, low = (torch.from_numpy(x).view(len(data), -1, 8) for x in Q4_K.get_scale_min(packed))
    codes = _nibbles(blocks[..., 16:].reshape(len(data), -1, SMALL))
    return four_bit(codes, (steps[0] * scale).flatten(1), -(steps[1] * low).flatten(1))


def _q6_k(data: np.ndarray) -> QuantizedWeight:
    """6 bits a code, 4 in one place and 2 in another; here a byte each, 16 to a scale."""
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


def _nibbles(blocks: np.ndarray) -> Tensor:
    """4-bit codes: the low halves of a block's bytes, then the high halves."""
    return _codes(np.concatenate([blocks & 15, blocks >> 4], -1))


def _half(blocks: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(blocks).view(np.float16))[..., 0]
