"""The kinds of EAGLE-3 heads: what a head reads, and where its norms stand.

Heads trained here have one form. Those trained elsewhere differ in what EAGLE-3 (Li et al., 2025)
and EAGLE-3.1 (arXiv 2605.09992) leave open; the fields have the names that servers know them by.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

# of the norms of heads trained here
EPSILON = 1e-5
# how many confirmed tokens a row attends to, at most; answers in training are no longer
WINDOW = 512
# a head's fields, as tensors of one element beside its weights; one that is missing is as in heads
# trained here
FIELDS = ("epsilon", "reads_z", "norm_before_residual", "norm_output", "window")


@dataclass(frozen=True, slots=True)
class HeadForm:
    """What a head reads, and where its norms stand.

    ``features``: of a confirmed token, those the head reads; the first is the model's normed last
    hidden state z where it ``reads_z``. ``fc_norm``: "each" feature is normed before ``fc``, all
    "together", or "none". ``norm_before_residual``: attention is added to the normed hidden state.
    ``norm_output``: the state is normed where it takes the place of a draft token's feature too.
    ``window``: how many tokens a row attended to in training; 0: all.
    """

    features: int
    epsilon: float = EPSILON
    reads_z: bool = True
    fc_norm: Literal["each", "together", "none"] = "each"
    norm_before_residual: bool = True
    norm_output: bool = True
    window: int = WINDOW

    @property
    def norms(self) -> tuple[str, ...]:
        """The names of its norms' weights."""
        first = {"each": ("fc_norm",), "together": ("input_norm",), "none": ()}[self.fc_norm]
        return (*first, "token_norm", "hidden_norm", "mlp_norm", "norm")

    @property
    def trained_here(self) -> bool:
        return self == HeadForm(self.features)


def form_of(tensors: Mapping[str, Tensor]) -> HeadForm:
    """The form of a head's ``tensors``; where the layers of its features are not among them, those
    are as wide as the head."""
    reads_z = bool(tensors.get("reads_z", True))
    if "features" in tensors:
        count = len(tensors["features"]) + reads_z
    else:
        count = tensors["fc"].shape[1] // len(tensors["norm"])
    # as written in a checkpoint: float32 has digits of its own
    epsilon = float(f"{float(tensors.get('epsilon', EPSILON)):.6g}")
    each = "fc_norm" in tensors
    return HeadForm(
        count,
        epsilon,
        reads_z,
        "each" if each else "together" if "input_norm" in tensors else "none",
        bool(tensors.get("norm_before_residual", True)),
        bool(tensors.get("norm_output", True)),
        int(tensors.get("window", WINDOW)),
    )
