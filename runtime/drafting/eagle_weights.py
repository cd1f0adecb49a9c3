"""The draft head's matrices, quantised: a wrong draft token costs time alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from eepass.ops.packing import GROUP, form_number
from eepass.runtime.drafting.eagle_form import HeadForm, form_of
from eepass.runtime.drafting.eagle_layer import JOINED

# inputs that share a scale
INPUTS = 64


class Matrix(NamedTuple):
    """How joined matrices are stored: the outputs of each, and the form they are packed in, None
    where they are plain."""

    outputs: tuple[int, ...]
    form: int | None


@dataclass(frozen=True, slots=True)
class Layout:
    """The width of a head, how each matrix is stored, and the form of the draft head."""

    head_width: int
    matrices: Mapping[str, Matrix]
    form: HeadForm = field(repr=False)

    @property
    def structure(self) -> str:
        """What compiled code is for; of heads trained here, as it was before there were others."""
        return repr(self) + ("" if self.form.trained_here else repr(self.form))


class HeadWeights:
    """What all sequences share of a draft head, packed when it is first run.

    ``embedding``: the model's; a head may have its own. ``bits`` says of how many bits weights are,
    4 or 8; None: as they are.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], embedding: Tensor, bits: Callable[[], int | None]
    ) -> None:
        self.dtype = embedding.dtype
        self.embedding = tensors.get("eagle.embedding", embedding).to(self.dtype)
        self.form = form_of({n.removeprefix("eagle."): t for n, t in tensors.items()})
        self.matrices = {
            name: [tensors[f"eagle.{part}"].to(self.dtype) for part in parts]
            for name, parts in JOINED.items()
        }
        self.matrices["head"] = [tensors["eagle.hot.head"].to(self.dtype)]
        self.norms = [tensors[f"eagle.{name}"].to(self.dtype) for name in self.form.norms]
        self.frequencies = tensors["eagle.rotary"].float()
        self.hot_ids = tensors["eagle.hot.ids"]
        self.bits = bits

    @cached_property
    def packed(self) -> tuple[list[Tensor], Layout]:
        """The inputs of every step, in the order ``eagle_steps.Step`` takes them."""
        bits = self.bits()
        made = {name: packed_matrices(parts, bits) for name, parts in self.matrices.items()}
        matrices = {name: matrix for name, (_, matrix) in made.items()}
        layout = Layout(2 * len(self.frequencies), matrices, self.form)
        weights = [weight for weight, _ in made.values()]
        return [*weights, *self.norms, self.frequencies, self.embedding, self.hot_ids], layout


def packed_matrices(parts: Sequence[Tensor], bits: int | None) -> tuple[Tensor, Matrix]:
    """The matrices [N, K] below one another, rounded to ``bits`` and packed; as they are where they
    have no such form."""
    weight, outputs = torch.cat([*parts]), tuple(len(part) for part in parts)
    inputs = weight.shape[1]
    if bits is None or inputs % GROUP:
        return weight.contiguous(), Matrix(outputs, None)
    group = INPUTS if inputs % INPUTS == 0 else GROUP
    codes, scales, lows = rounded(weight, bits, group)
    form = form_number(f"u{bits}", group)
    return torch.ops.eepass.pack_groups(codes, scales, lows, form), Matrix(outputs, form)


def rounded(weight: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """``weight`` [N, K] as codes [N, K] with a scale and a least value [N, K / group]."""
    parts = weight.float().unflatten(1, (-1, group))
    low, high = parts.amin(-1), parts.amax(-1)
    scale = ((high - low) / (2**bits - 1)).clamp_min(1e-12)
    codes = ((parts - low[..., None]) / scale[..., None]).round().clamp(0, 2**bits - 1)
    return codes.to(torch.uint8).flatten(1), scale, low
