"""All kernels a model needs, specialised for it, and an estimate of their time on a GPU."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eepass.codegen.kernels import (
    draft_topk,
    exit_predictor,
    verify_head,
)
from eepass.codegen.kernels.launch import KernelLaunch, Scratch
from eepass.kernel_forms import HeadChain

# an assumption, not measured: what a launch costs within a CUDA graph
LAUNCH_US = 1.3
# another: bytes a second that one multiprocessor can load
PROGRAM_BANDWIDTH = 80e9
# compute capability -> memory bandwidth of a well-known card, of which kernels reach nine tenths
BANDWIDTH = {80: 2.04e12, 86: 0.936e12, 89: 1.008e12, 90: 4.8e12}
REACHED = 0.9


@dataclass(frozen=True, slots=True)
class Sizes:
    """What kernels are specialised for besides the head's form.

    ``rank`` 0: no exit has a translator; ``hot`` 0: no hot vocabulary.
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


def kernels(chain: HeadChain, sizes: Sizes) -> dict[str, KernelLaunch]:
    """Launches by name, ``operator[.form].kernel``, over meta tensors."""
    found: dict[str, KernelLaunch] = {}
    for name, launches in _operators(chain, sizes):
        for launch in launches:
            kernel = launch.kernel.__name__.strip("_").removesuffix("_kernel")
            found[f"{name}.{kernel}"] = launch
    return found


def predicted_us(launch: KernelLaunch, capability: int) -> float:
    """Estimated time of a launch inside a CUDA graph: its bytes at the bandwidth of the card, or
    of its programs where they are few, and the overhead of a launch."""
    programs = math.prod(launch.grid)
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

    state = tensor(rows, hidden)
    scratch = Scratch(state)
    norms: tuple[Any, ...] = (
        tensor(hidden) if chain.norm_weight else None,
        tensor(hidden) if chain.norm_bias else None,
    )
    no_translator: tuple[Any, ...] = (None, None, None)
    rank = sizes.rank
    translator = (tensor(hidden), tensor(rank, hidden), tensor(hidden, rank))
    shapes = ((sizes.width, 3 * drafts), (sizes.width,), (sizes.width,), (1,))
    mlp = (
        tensor(rows, drafts, dtype=torch.float32),
        *(tensor(*shape, dtype=sizes.predictor) for shape in shapes),
        tensor(1, dtype=torch.float32),
    )
    norm_form: tuple[Any, ...] = (chain.norm, chain.eps, chain.weight_offset)
    logit_form = (chain.logit_scale, chain.logit_cap)

    def point(translator: tuple[Any, ...]) -> tuple[Any, ...]:
        return (state, *translator, *norms, *head(sizes.vocabulary), ids(rows, drafts), *mlp)

    translators = {"lens": no_translator, **({"translated": translator} if rank else {})}
    for name, tensors in translators.items():
        arguments = (*point(tensors), *norm_form, *logit_form)
        yield f"exit_predictor.{name}", exit_predictor.launches(*arguments, scratch=scratch)[0]

    vocabularies = {"full": sizes.vocabulary, **({"hot": sizes.hot} if sizes.hot else {})}
    # from a hidden state, and from the state that a predictor has normed
    norm_forms = {"": (*norms, *norm_form), ".normed": (None, None, "none", 0.0, 0.0)}
    for name, size in vocabularies.items():
        hot_ids = ids(size) if name == "hot" else None
        for suffix, (weight, bias, *norm) in norm_forms.items():
            arguments = (
                state, *no_translator, weight, bias, *head(size), hot_ids, ids(rows, drafts),
                *norm, *logit_form, False,
            )  # fmt: skip
            yield (
                f"verify_head.{name}{suffix}",
                verify_head.launches(*arguments, scratch=scratch)[0],
            )
    # the logits of the model itself, as lower_cuda.lower_logits calls it
    arguments = (
        state, *no_translator, None, None, *head(sizes.vocabulary), None, ids(rows, 1),
        "none", 0.0, 0.0, 1.0, 0.0, True,
    )  # fmt: skip
    yield "verify_head.logits", verify_head.launches(*arguments, scratch=scratch)[0]

    size = sizes.hot or sizes.vocabulary
    hot_ids = ids(size) if sizes.hot else None
    arguments = (state, *head(size), hot_ids, drafts, *logit_form)
    yield "draft_topk", draft_topk.launches(*arguments, scratch=scratch)[0]
