"""The pieces at a plan's exits as kernels: fused where the head is one that kernels know."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from eepass.passes.fuse_exit_predictor import fuse_exit_predictor
from eepass.passes.insert_predictors import insert_predictors
from eepass.passes.report import PassReport
from eepass.plan import ExitPieces, ExitPlan, SplitDecoder


def fused_pieces(
    split: SplitDecoder,
    plan: ExitPlan,
    tensors: Mapping[str, Tensor],
    report: PassReport,
    rows: int = 1,
) -> ExitPieces:
    """``insert_predictors``' pieces, each predictor one ``eepass::exit_predictor`` where it can be;
    where not, ``report`` says why. ``tensors`` with ``plan.threshold_tensors()``.

    What reads logits on top of that (verification, drafts) the CUDA compiler turns into
    ``eepass::verify_head``; a step on the device takes ``fuse_exit_predictor``'s own pieces.
    """
    pieces = insert_predictors(split, plan, tensors, PassReport(), rows)
    fused = fuse_exit_predictor(split, plan, tensors, report, rows)
    return pieces if fused is None else replace(pieces, predictors=fused.predictors)
