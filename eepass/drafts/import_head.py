"""Make an artefact of a draft head that was trained elsewhere, its acceptance measured."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eepass.checkpoints.artifact import Artifact, PresetPart, fingerprint
from eepass.checkpoints.draft_checks import refuse_bad_draft_head
from eepass.checkpoints.fitting_artifact import artifact_for
from eepass.checkpoints.models import LoadedModel, original_of
from eepass.drafts.read_head import read_head
from eepass.drafts.target import target_of
from eepass.errors import InputError
from eepass.files import writing
from eepass.training.card import write_card
from eepass.training.dense_model import DenseModel
from eepass.training.measured_draft import measure_draft
from eepass.training.progress import NoProgress, Progress


def import_draft(
    loaded: LoadedModel,
    head: str | Path,
    out: str | Path | None = None,
    artifact: str | Path | Artifact | None = None,
    layers: tuple[int, ...] | None = None,
    prompts: str | Path | None = None,
    tokens: int = 2000,
    raw: bool = False,
    progress: Progress | None = None,
) -> Artifact:
    """An artefact for ``loaded`` with the EAGLE-3 head in the folder ``head``; written to ``out``.

    The head may be in the flat form or in that of the library ``speculators``, EAGLE-3.1 included.
    ``artifact``: one whose exits are kept, but those that draft with its own head. ``layers``:
    after which the head's features are taken, instead of what its config says. How many of its
    draft tokens are accepted is measured on ``tokens`` of the model's own answers to ``prompts``,
    as for ``eepass.train``, held-out ones by default. Raises ``InputError`` naming what does not
    fit.
    """
    model = original_of(loaded, "import for the original one, then transform that")
    folder = Path(head)
    if not folder.is_dir():
        raise InputError(f"{folder}: no folder with a head")
    kept = None if artifact is None else artifact_for(model, artifact)
    with torch.no_grad():
        dense = DenseModel(model, 512)
        target = target_of(model, dense.decoder.splits[1])
        eagle, config = read_head(folder, target, layers)
        _refuse_bad_numbers(folder, eagle)
        refuse_bad_draft_head(eagle, target.hidden, target.depth, target.vocabulary)
        exits, presets = _kept_exits(kept)
        report = measure_draft(loaded, dense, eagle, prompts, tokens, raw, progress or NoProgress())
    report["draft_head"]["config"] = asdict(config)
    known = {} if kept is None else kept.report
    made = Artifact(fingerprint(model), presets, exits | eagle, {**known, **report})
    if out is not None:
        with writing(Path(out)):
            made.save(Path(out))
            write_card(Path(out), loaded, made)
    return made


def _refuse_bad_numbers(folder: Path, tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise InputError(f"{folder}: {name} holds numbers that are not finite")


def _kept_exits(
    artifact: Artifact | None,
) -> tuple[dict[str, Tensor], dict[str, PresetPart]]:
    """The exits of ``artifact`` that do not draft with its head."""
    if artifact is None:
        return {}, {}
    presets = {name: part for name, part in artifact.presets.items() if part.draft_layer}
    left: tuple[str, ...] = tuple(
        f"predictor.{name}." for name in artifact.presets if name not in presets
    )
    tensors: dict[str, Any] = {
        name: tensor
        for name, tensor in artifact.tensors.items()
        if not name.startswith(("eagle.", *left))
    }
    return tensors, presets
