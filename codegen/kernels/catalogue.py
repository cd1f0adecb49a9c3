"""All kernels a model needs, specialised for it, with what they should take on a machine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eepass.codegen.kernels import (
    draft_topk,
    exit_predictor,
    fill_kv,
    path_predictor,
    verify_head,
)
from eepass.codegen.kernels.launch import Launch
from eepass.plan import HeadChain

# what a launch costs within a CUDA graph, measured on an H200
LAUNCH_US = 1.3
# bytes a second one multiprocessor can ask for
PROGRAM_BANDWIDTH = 80e9
# compute capability -> bytes a second of a well-known card, of which nine tenths are reached
BANDWIDTH = {80: 2.04e12, 86: 0.936e12, 89: 1.008e12, 90: 4.8e12}
REACHED = 0.9


@dataclass(frozen=True, slots=True)
class KvSizes:
    layers: int
    groups: int
    channels: int
    rotary: int
    slots: int
    norm: str
    eps: float
    weight_offset: float
    norm_bias: bool
    bias: bool
    head_norm: bool


@dataclass(frozen=True, slots=True)
class Sizes:
    """What kernels are specialised for besides the head's form.

    ``rank`` 0: no exit has a translator; ``hot`` 0: drafts name any token. ``kv`` as ``fill_kv``
    takes it: skipped layers, groups, channels, rotary channels, slots; None where a layer writes
    keys and values in a way the kernel does not know.
    """

    rows: int
    hidden: int
    vocabulary: int
    hot: int
    drafts: int
    width: int
    rank: int
    dtype: torch.dtype
    kv: KvSizes | None = None


def kernels(chain: HeadChain, sizes: Sizes) -> dict[str, Launch]:
    """Launches by name, ``operator[.form].kernel``, over tensors that are nowhere."""
    found: dict[str, Launch] = {}
    for name, launches in _operators(chain, sizes):
        for launch in launches:
            kernel = launch.kernel.__name__.strip("_").removesuffix("_kernel")
            found[f"{name}.{kernel}"] = launch
    return found


def predicted_us(launch: Launch, capability: int) -> float:
    """Time of a launch inside a CUDA graph: its bytes at the card's bandwidth, or at what its
    programs can ask for, and the launch itself. An estimate, not a measurement."""
    programs = 1
    for extent in launch.grid:
        programs *= extent
    reached = min(BANDWIDTH[capability] * REACHED, programs * PROGRAM_BANDWIDTH)
    return LAUNCH_US + launch.bytes / reached * 1e6


def _operators(chain: HeadChain, sizes: Sizes) -> Iterator[tuple[str, list[Launch]]]:
    rows, hidden, drafts = sizes.rows, sizes.hidden, sizes.drafts

    def tensor(*shape: int, dtype: torch.dtype = sizes.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def floats(*shape: int) -> Tensor:
        return tensor(*shape, dtype=torch.float32)

    def ids(*shape: int) -> Tensor:
        return tensor(*shape, dtype=torch.long)

    def head(size: int) -> tuple[Any, ...]:
        return tensor(size, hidden), None, tensor(size) if chain.head_bias else None

    boundary = tensor(rows, hidden)
    norms: tuple[Any, ...] = (
        tensor(hidden) if chain.norm_weight else None,
        tensor(hidden) if chain.norm_bias else None,
    )
    lens: tuple[Any, ...] = (None, None, None)
    rank = sizes.rank
    translator: tuple[Any, ...] = (tensor(hidden), tensor(rank, hidden), tensor(hidden, rank))
    mlp: tuple[Any, ...] = (
        floats(rows, drafts), floats(sizes.width, 3 * drafts), floats(sizes.width),
        floats(sizes.width), floats(1), floats(1),
    )  # fmt: skip
    form: tuple[Any, ...] = (chain.norm, chain.eps, chain.weight_offset)
    logit_form: tuple[Any, ...] = (chain.logit_scale, chain.logit_cap)
    forms = {"lens": lens, **({"translated": translator} if rank else {})}
    for name, to_state in forms.items():
        asked = (boundary, *to_state, *norms, *head(sizes.vocabulary), ids(rows, drafts), *mlp)
        predictor = exit_predictor.launches(*asked, *form, *logit_form)
        yield f"exit_predictor.{name}", predictor[0]
    paths = path_predictor.launches(*asked, ids(rows, 8), *form, *logit_form)
    yield "path_predictor", paths[0][-1:]

    vocabularies = {"full": sizes.vocabulary, **({"hot": sizes.hot} if sizes.hot else {})}
    for name, size in vocabularies.items():
        names = ids(size) if name == "hot" else None
        told: tuple[Any, ...] = (boundary, *lens, *norms, *head(size), names, ids(rows, drafts))
        told = (*told, *form, *logit_form, False)
        yield f"verify_head.{name}", verify_head.launches(*told)[0]
    size = sizes.hot or sizes.vocabulary
    names = ids(size) if sizes.hot else None
    scored: tuple[Any, ...] = (boundary, *head(size), names, drafts, *logit_form)
    yield "draft_topk", draft_topk.launches(*scored)[0]

    if (kv := sizes.kv) is not None:

        def each(there: bool, *shape: int) -> list[Tensor]:
            return [tensor(*shape) for _ in range(kv.layers)] if there else []

        out, turns = kv.groups * kv.channels, floats(rows, kv.rotary) if kv.rotary else None
        cache = each(True, kv.groups, kv.slots, kv.channels)
        yield "fill_kv", fill_kv.launches(
            boundary, each(kv.norm != "none", hidden), each(kv.norm_bias, hidden),
            each(True, out, hidden), each(kv.bias, out), each(True, out, hidden),
            each(kv.bias, out), each(kv.head_norm, kv.channels), cache, cache, turns, turns,
            ids(rows), kv.norm, kv.eps, kv.weight_offset,
        )[0]  # fmt: skip
