"""Which artefact fits a model, and what may be used of one that does not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from eepass.checkpoints.artifact import MANIFEST, SHIPPED, Artifact, fingerprint, load_artifact
from eepass.checkpoints.quantized_weights import quantized_layers
from eepass.errors import InputError
from eepass.reading import parse_json


def refuse_other_model(
    artifact: Artifact, model: Any, where: Path | str, same_weights: bool = True
) -> None:
    """Raise ``InputError`` naming the first field in which the artefact is of another model, and
    what to do; not ``same_weights``: rounding may have changed those."""
    for name, value in fingerprint(model).items():
        known = artifact.fingerprint.get(name)
        if known == value or (name == "weights" and (artifact.any_weights or not same_weights)):
            continue
        if name != "weights":
            help = "run eepass train"
        elif any(quantized_layers(model)):
            help = "run eepass calibrate, if it is the same model quantised"
        else:
            help = (
                "thresholds hold for those weights alone: run eepass train, or calibrate; or of "
                "the same model with an adapter, or trained on, take the draft head, with "
                "--drafts-alone or eepass.drafts_alone"
            )
        raise InputError(
            f"{where}: trained for another model ({name} is {known!r} there, {value!r} here); "
            + help
        )


def artifact_for(
    model: Any, artifact: str | Path | Artifact, where: str = "artifact", same_weights: bool = True
) -> Artifact:
    """``artifact``, read if it is a folder or an id of the hub; raises ``InputError`` where it is
    damaged or, calling it ``where``, not of ``model``. ``same_weights`` as for
    ``refuse_other_model``."""
    found = artifact if isinstance(artifact, Artifact) else load_artifact(artifact)
    refuse_other_model(found, model, where, same_weights)
    return found


def drafts_alone(artifact: str | Path | Artifact) -> Artifact:
    """The draft head of ``artifact`` alone, for a model of the same shape with other weights: one
    with an adapter, merged or attached, or one that was trained on.

    Its tokens are verified, so they cost speed where they fit badly, never correctness; exits and
    thresholds hold for the weights they were trained on, and are left out. Raises ``InputError``
    where there is no head, or ``artifact`` is damaged.
    """
    found = artifact if isinstance(artifact, Artifact) else load_artifact(artifact)
    kept = {n: t for n, t in found.tensors.items() if n.startswith(("eagle.", "hot."))}
    if "eagle.fc" not in kept:
        raise InputError("the artefact has no draft head, and its exits hold for its model alone")
    return replace(found, presets={}, tensors=kept, any_weights=True)


def artifact_beside(checkpoint: Path) -> Path | None:
    """The artefact in the folder ``eepass`` of a checkpoint, if there is one."""
    folder = checkpoint / "eepass"
    return folder if (folder / MANIFEST).is_file() else None


def found_artifact(model: Any) -> Path | None:
    """The artefact that belongs to ``model``: the one beside its checkpoint, or the shipped one if
    it is of this model; None if there is neither."""
    name = getattr(model, "name_or_path", "")
    if name and (beside := artifact_beside(Path(name))):
        return beside
    if (SHIPPED / MANIFEST).is_file():
        trained_for = parse_json((SHIPPED / MANIFEST).read_bytes())["fingerprint"]
        # the architecture first: hashing weights takes longer
        same = trained_for["architecture"] == type(model).__name__
        if same and trained_for == fingerprint(model):
            return SHIPPED
    return None
