"""What an artefact must be to be one: its tensors' names, shapes and ids, and its numbers.

Sizes are those of the fingerprint, which is the model's where the artefact is used.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from eepass.checkpoints.draft_checks import refuse_bad_draft_head
from eepass.checkpoints.tensor_checks import ids_of, match
from eepass.errors import InputError
from eepass.reading import is_whole_number

# shapes by letter: H is the model's width, B a translator's, W a predictor's, D its features
PREDICTOR = {"w1": "WD", "b1": "W", "w2": "W", "b2": "1"}
TRANSLATOR = {"scale": "H", "down": "BH", "up": "HB"}
# the features of a predictor for each draft token
FEATURES = 3


def refuse_bad_fingerprint(fingerprint: Any) -> None:
    """Raise ``InputError`` for a fingerprint without a model's sizes."""
    if not isinstance(fingerprint, Mapping):
        raise InputError("field fingerprint is no object")
    for name in ("layers", "hidden", "vocabulary"):
        value = fingerprint.get(name, 0)
        if not is_whole_number(value) or value < 1:
            raise InputError(f"fingerprint: {name} is {value!r}, not a size")


def refuse_bad_numbers(name: str, part: Any, layers: int) -> None:
    """Raise ``InputError`` for a preset ``part`` that a model of so many ``layers`` cannot have."""
    if not 0 <= part.draft_layer <= layers or part.draft_tokens < 1:
        raise InputError(
            f"preset {name}: {part.draft_tokens} draft tokens after layer {part.draft_layer}"
        )
    if not part.calibrations:
        raise InputError(f"preset {name}: no calibrations")
    for calibration in part.calibrations:
        numbers = (calibration.target, calibration.agreement, calibration.mean_exit_layer,
                   calibration.speedup, *calibration.thresholds.values())  # fmt: skip
        if not all(map(math.isfinite, numbers)):
            raise InputError(f"preset {name}: a calibration holds what is no number")
        for layer in (*calibration.thresholds, *calibration.ranking):
            if not 1 <= layer <= layers:
                raise InputError(f"preset {name}: an exit after layer {layer} of {layers}")


def refuse_bad_tensors(
    tensors: Mapping[str, Tensor], presets: Mapping[str, Any], fingerprint: Mapping[str, Any]
) -> None:
    """Raise ``InputError`` naming the first tensor that is missing, or of another shape or range
    than ``presets`` and the model of ``fingerprint`` have."""
    sizes = {"H": int(fingerprint["hidden"]), "1": 1}
    layers, vocabulary = int(fingerprint["layers"]), int(fingerprint["vocabulary"])
    for preset, part in presets.items():
        prefix = f"predictor.{preset}."
        numbered = {n.removeprefix(prefix).partition(".")[0] for n in tensors if prefix in n}
        wanted = {str(n) for calibration in part.calibrations for n in calibration.thresholds}
        for layer in sorted(numbered | wanted):
            _refuse_other_layer(prefix + layer, layer, layers)
            own = {**sizes, "D": FEATURES * part.draft_tokens}
            match(tensors, f"{prefix}{layer}.", PREDICTOR, own)
    for layer in sorted({n.split(".")[1] for n in tensors if n.startswith("translator.")}):
        _refuse_other_layer(f"translator.{layer}", layer, layers)
        match(tensors, f"translator.{layer}.", TRANSLATOR, dict(sizes))
    if any(name.startswith("eagle.") for name in tensors):
        refuse_bad_draft_head(tensors, sizes["H"], layers, vocabulary)
    if not presets and "eagle.fc" in tensors:
        # a head from elsewhere comes without exits
        return
    hot = ids_of(tensors, "hot.ids", vocabulary)
    most = max((part.draft_tokens for part in presets.values()), default=0)
    if len(hot) < most:
        raise InputError(f"hot.ids: {len(hot)} tokens to draft {most} from")


def _refuse_other_layer(name: str, layer: str, layers: int) -> None:
    if not (layer.isascii() and layer.isdecimal() and 1 <= int(layer) <= layers):
        raise InputError(f"{name}: the model has layers 1 to {layers}")
