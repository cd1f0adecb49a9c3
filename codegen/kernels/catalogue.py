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
from eepass.codegen.kernels.launch import KernelLaunch, Scratch
from eepass.kernel_forms import Channels, HeadChain, KvForm

# what a launch costs within a CUDA graph, measured on an H200
LAUNCH_US = 1.3
# bytes a second one multiprocessor can ask for
PROGRAM_BANDWIDTH = 80e9
# compute capability -> bytes a second of a well-known card, of which nine tenths are reached
BANDWIDTH = {80: 2.04e12, 86: 0.936e12, 89: 1.008e12, 90: 4.8e12}
REACHED = 0.9


@dataclass(frozen=True, slots=True)
class KvSizes:
    """What ``fill_kv`` is specialised for: skipped layers, slots, and the layers' form with the
    outputs of the projections that make keys, and values, and the dtype of rotary values."""

    layers: int
    slots: int
    form: KvForm
    key_outputs: int
    value_outputs: int
    turns: torch.dtype


@dataclass(frozen=True, slots=True)
class Sizes:
    """What kernels are specialised for besides the head's form.

    ``rank`` 0: no exit has a translator; ``hot`` 0: drafts name any token. ``kv`` as ``fill_kv``
    takes it; None where a layer writes keys and values in a way the kernel does not know.
    """

    rows: int
    hidden: int
    vocabulary: int
    hot: int
    drafts: int
    width: int
    rank: int
    predictor: torch.dtype
    dtype: torch.dtype
    kv: KvSizes | None = None


def kernels(chain: HeadChain, sizes: Sizes) -> dict[str, KernelLaunch]:
    """Launches by name, ``operator[.form].kernel``, over tensors that are nowhere."""
    found: dict[str, KernelLaunch] = {}
    for name, launches in _operators(chain, sizes):
        for launch in launches:
            kernel = launch.kernel.__name__.strip("_").removesuffix("_kernel")
            found[f"{name}.{kernel}"] = launch
    return found


def predicted_us(launch: KernelLaunch, capability: int) -> float:
    """Time of a launch inside a CUDA graph: its bytes at the card's bandwidth, or at what its
    programs can ask for, and the launch itself. An estimate, not a measurement."""
    programs = 1
    for extent in launch.grid:
        programs *= extent
    reached = min(BANDWIDTH[capability] * REACHED, programs * PROGRAM_BANDWIDTH)
    return LAUNCH_US + launch.bytes / reached * 1e6


def _operators(chain: HeadChain, sizes: Sizes) -> Iterator[tuple[str, list[KernelLaunch]]]:
    rows, hidden, drafts = sizes.rows, sizes.hidden, sizes.drafts

    def tensor(*shape: int, dtype: torch.dtype = sizes.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def ids(*shape: int) -> Tensor:
        return tensor(*shape, dtype=torch.long)

    def head(size: int) -> tuple[Any, ...]:
        return tensor(size, hidden), None, tensor(size) if chain.head_bias else None

    boundary = tensor(rows, hidden)
    scratch = Scratch(boundary)
    norms: tuple[Any, ...] = (
        tensor(hidden) if chain.norm_weight else None,
        tensor(hidden) if chain.norm_bias else None,
    )
    lens: tuple[Any, ...] = (None, None, None)
    rank = sizes.rank
    translator: tuple[Any, ...] = (tensor(hidden), tensor(rank, hidden), tensor(hidden, rank))
    shapes = ((sizes.width, 3 * drafts), (sizes.width,), (sizes.width,), (1,))
    mlp: tuple[Any, ...] = (
        tensor(rows, drafts, dtype=torch.float32),
        *(tensor(*shape, dtype=sizes.predictor) for shape in shapes),
        tensor(1, dtype=torch.float32),
    )
    form: tuple[Any, ...] = (chain.norm, chain.eps, chain.weight_offset)
    logit_form: tuple[Any, ...] = (chain.logit_scale, chain.logit_cap)
    forms = {"lens": lens, **({"translated": translator} if rank else {})}
    for name, to_state in forms.items():
        asked = (boundary, *to_state, *norms, *head(sizes.vocabulary), ids(rows, drafts), *mlp)
        predictor = exit_predictor.launches(*asked, *form, *logit_form, scratch=scratch)
        yield f"exit_predictor.{name}", predictor[0]
    paths = path_predictor.launches(*asked, ids(rows, 8), *form, *logit_form, scratch=scratch)
    yield "path_predictor", paths[0][-1:]

    vocabularies = {"full": sizes.vocabulary, **({"hot": sizes.hot} if sizes.hot else {})}
    for name, size in vocabularies.items():
        names = ids(size) if name == "hot" else None
        asked = (*head(size), names, ids(rows, drafts))
        # from a boundary, and from the state a predictor has normed
        norm_forms = {"": (*norms, *form), ".normed": (None, None, "none", 0.0, 0.0)}
        for suffix, (weight, bias, *norm) in norm_forms.items():
            told = (boundary, *lens, weight, bias, *asked, *norm, *logit_form, False)
            made, _ = verify_head.launches(*told, scratch=scratch)
            yield f"verify_head.{name}{suffix}", made
        if name == "full":
            # the model's own logits, as the compiler of its head has them: raw, for any draft
            told = (boundary, *lens, None, None, *head(size), None, ids(rows, 1))
            told = (*told, "none", 0.0, 0.0, 1.0, 0.0, True)
            yield "verify_head.logits", verify_head.launches(*told, scratch=scratch)[0]
    size = sizes.hot or sizes.vocabulary
    names = ids(size) if sizes.hot else None
    scored: tuple[Any, ...] = (boundary, *head(size), names, drafts, *logit_form)
    yield "draft_topk", draft_topk.launches(*scored, scratch=scratch)[0]

    if (kv := sizes.kv) is not None:
        yield "fill_kv", fill_kv.launches(*_fill_arguments(boundary, kv), scratch=scratch)[0]


def _fill_arguments(boundary: Tensor, kv: KvSizes) -> tuple[Any, ...]:
    form, (rows, hidden) = kv.form, boundary.shape

    def each(there: str, *shape: int) -> list[Tensor]:
        return [boundary.new_empty(shape) for _ in range(kv.layers)] if there else []

    def projected(
        weight: str, bias: str, outputs: int, of: Channels
    ) -> tuple[list[Tensor], list[Tensor]]:
        shape = (hidden, outputs) if form.transposed else (outputs, hidden)
        return [form.projection(w, of) for w in each(weight, *shape)], [
            form.bias(b, of) for b in each(bias, outputs)
        ]

    turns = None
    if form.cos:
        turns = boundary.new_empty(rows, form.rotary, dtype=kv.turns)
    cache = each("caches", form.groups, kv.slots, form.channels)
    return (
        boundary, each(form.norm_weight, hidden), each(form.norm_bias, hidden),
        *projected(form.key_weight, form.key_bias, kv.key_outputs, form.key_channels),
        *projected(form.value_weight, form.value_bias, kv.value_outputs, form.value_channels),
        each(form.head_norm, form.channels), each(form.head_bias, form.channels), cache, cache,
        turns, turns, boundary.new_empty(rows, dtype=torch.long), form.norm, form.eps,
        form.weight_offset, form.interleaved, form.head_form,
    )  # fmt: skip
