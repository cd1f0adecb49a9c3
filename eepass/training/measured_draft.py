"""How far the tokens of a draft head are accepted, on the model's own answers."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eepass.checkpoints.artifact import without_prefix
from eepass.checkpoints.draft_codes import in_dtype
from eepass.checkpoints.models import LoadedModel
from eepass.training.by_kind import report_by_kind
from eepass.training.dense_model import DenseModel
from eepass.training.draft_head import STEPS, hits_of
from eepass.training.hidden_states import HiddenStateStore, collect
from eepass.training.progress import Progress
from eepass.training.recalibrate import answer, held_out_prompts

LONGEST = 256


@torch.no_grad()
def measure_draft(
    loaded: LoadedModel,
    model: DenseModel,
    tensors: Mapping[str, Tensor],
    prompts: str | Path | None,
    tokens: int,
    raw: bool,
    progress: Progress,
) -> dict[str, Any]:
    """The parts ``draft_head`` and ``by_kind`` of an artefact's report, for the draft head
    ``tensors``: of ``tokens`` answer tokens to held-out ``prompts``. Raises ``InputError`` where
    there are none."""
    asked = held_out_prompts(loaded, prompts, raw)
    examples = answer(model, asked, loaded.stop, tokens, LONGEST, progress)
    run = in_dtype(tensors, model.decoder.dtype)
    head = without_prefix(run, "eagle.")
    with tempfile.TemporaryDirectory() as scratch:
        store = HiddenStateStore(Path(scratch), (), head["features"].tolist())
        collect(model, examples, store, progress)
        measured = {
            "features": head["features"].tolist(),
            "hot_tokens": len(head["hot.ids"]),
            "steps": STEPS,
            "measured_on": len(store.labels("calibrate")),
            **hits_of(head, store, model, STEPS),
        }
        return {"draft_head": measured, "by_kind": report_by_kind(run, store, model, STEPS)}
