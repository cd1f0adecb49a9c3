"""The artefact: what training makes for one model. Safetensors and JSON, never a pickle."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from eepass.checkpoints.artifact_checks import (
    refuse_bad_fingerprint,
    refuse_bad_numbers,
    refuse_bad_tensors,
)
from eepass.checkpoints.draft_codes import as_codes, from_codes
from eepass.checkpoints.hub_artifact import fetch_artifact, is_hub_id
from eepass.checkpoints.quantized_weights import QuantizedWeight, quantized_layers
from eepass.errors import InputError
from eepass.files import save_tensors, write_text_atomically
from eepass.folders import scratch_folder
from eepass.reading import number, parse_json, whole_number

SCHEMA = 2
# the artefact of smollm2, part of the package
SHIPPED = Path(__file__).parents[1] / "data" / "smollm2"
MANIFEST = "eepass.json"
FILES = ("predictors.safetensors", "draft.safetensors")
# values of each weight that the fingerprint hashes
SAMPLE = 1024


@dataclass(frozen=True, slots=True)
class Calibration:
    """Thresholds for one target; agreement, exit layer and speed-up as predicted on held-out
    answers. ``ranking`` lists the exits in use, most frequent first."""

    target: float
    thresholds: dict[int, float]
    ranking: tuple[int, ...]
    agreement: float
    mean_exit_layer: float
    speedup: float

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Calibration:
        numbers = ("target", "agreement", "mean_exit_layer", "speedup")
        return cls(
            thresholds={int(k): number(v) for k, v in values["thresholds"].items()},
            ranking=tuple(whole_number(layer) for layer in values["ranking"]),
            **{name: number(values[name]) for name in numbers},
        )


@dataclass(frozen=True, slots=True)
class PresetPart:
    """One preset of an artefact: the layer it drafts from (0: the draft head), the number of draft
    tokens, and thresholds per target."""

    draft_layer: int
    draft_tokens: int
    calibrations: tuple[Calibration, ...]

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> PresetPart:
        calibrations = tuple(Calibration.from_json(c) for c in values["calibrations"])
        return cls(
            whole_number(values["draft_layer"]), whole_number(values["draft_tokens"]), calibrations
        )

    def at_target(self, target: float) -> Calibration:
        """The calibration for the least target that is at least ``target``."""
        fitting = [c for c in self.calibrations if c.target >= target - 1e-9]
        if not fitting:
            raise InputError(
                f"target_agreement={target}: the artefact is calibrated up to {self.most}"
            )
        return min(fitting, key=lambda c: c.target)

    @property
    def most(self) -> float:
        """The highest agreement it is calibrated for."""
        return max(c.target for c in self.calibrations)


@dataclass(frozen=True, slots=True)
class Artifact:
    """Tensors, ``predictor.<preset>.<layer>.*``, ``translator.<layer>.*``, ``eagle.*`` and
    ``hot.ids``, and what they were trained for. Without presets there is a draft head alone;
    ``any_weights``: which may draft for a model with other weights (``drafts_alone``)."""

    fingerprint: Mapping[str, Any]
    presets: Mapping[str, PresetPart]
    tensors: Mapping[str, Tensor]
    report: Mapping[str, Any] = field(default_factory=dict)
    any_weights: bool = False

    def predictors(self, preset: str) -> dict[str, Tensor]:
        """The predictors of a preset, ``<layer>.*``."""
        return without_prefix(self.tensors, f"predictor.{preset}.")

    def exits(self, preset: str) -> list[int]:
        """The layers of a preset that have a predictor."""
        return sorted({int(name.partition(".")[0]) for name in self.predictors(preset)})

    def save(self, folder: Path) -> None:
        """Write the artefact to ``folder`` whole or not at all; one that was there is replaced.

        Raises ``InputError`` if another process is writing it.
        """
        draft = {n: t for n, t in self.tensors.items() if n.startswith(("eagle.", "hot."))}
        rest = {n: t for n, t in self.tensors.items() if n not in draft}
        manifest = {
            "schema": SCHEMA,
            "fingerprint": dict(self.fingerprint),
            "presets": {name: asdict(part) for name, part in self.presets.items()},
            "report": dict(self.report),
        }
        # within the folder, which may be a file system of its own
        with scratch_folder(folder) as scratch:
            files: dict[str, str] = {}
            for name, tensors in zip(FILES, (rest, as_codes(draft)), strict=True):
                save_tensors(scratch / name, tensors)
                digest = _digest((scratch / name).read_bytes())
                # named by content: files of another artefact are not those of this manifest
                own = f"{Path(name).stem}-{digest[:8]}{Path(name).suffix}"
                os.replace(scratch / name, folder / own)
                files[own] = digest
            write_text_atomically(
                folder / MANIFEST, json.dumps({**manifest, "files": files}, indent=1) + "\n"
            )
            for left in folder.glob("*.safetensors"):
                if _written_by_us(left.name) and left.name not in files:
                    left.unlink()


def _written_by_us(name: str) -> bool:
    stems = "|".join(Path(file).stem for file in FILES)
    return re.fullmatch(rf"({stems})(-[0-9a-f]{{8}})?\.safetensors", name) is not None


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def without_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with ``prefix``, by the rest of their names."""
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def local_folder(spec: str | Path) -> Path:
    """The folder of the artefact ``spec``; of an id, ``org/name[@revision]``, the one in the hub's
    cache, fetched if it is not there. Raises ``InputError`` where there is no such artefact."""
    if is_hub_id(spec):
        return fetch_artifact(spec, MANIFEST, FILES, _written_by_us)
    return Path(spec)


def load_artifact(folder: str | Path, read: Callable[[Path], bytes] = Path.read_bytes) -> Artifact:
    """Read an artefact, from a folder or by its id on the hub; raises ``InputError`` saying which
    file or field does not fit.

    ``read`` returns the contents of a file.
    """
    folder = local_folder(folder)
    path = folder / MANIFEST
    try:
        text = read(path)
    except OSError as error:
        raise InputError(f"{folder}: no artefact here ({MANIFEST} cannot be read)") from error
    try:
        manifest = parse_json(text)
    except ValueError as error:
        raise InputError(f"{path}: damaged, not JSON ({error}); train again") from error
    if not isinstance(manifest, dict):
        raise InputError(f"{path}: damaged, no JSON object; train again")
    if manifest.get("schema") != SCHEMA:
        raise InputError(
            f"{path}: schema {manifest.get('schema')!r}, this eepass reads {SCHEMA}; train again"
        )
    try:
        presets = {n: PresetPart.from_json(part) for n, part in manifest["presets"].items()}
        fingerprint, report = manifest["fingerprint"], dict(manifest.get("report", {}))
        # older artefacts have two files without hashes
        files = dict(manifest.get("files", dict.fromkeys(FILES)))
        if foreign := [name for name in files if not _written_by_us(name)]:
            raise ValueError(f"files, with {foreign[0]!r},")
        refuse_bad_fingerprint(fingerprint)
        for name, part in presets.items():
            refuse_bad_numbers(name, part, fingerprint["layers"])
    except InputError as error:
        raise InputError(f"{path}: {error}; train again") from error
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise InputError(f"{path}: field {error} is missing or damaged; train again") from error
    tensors: dict[str, Tensor] = {}
    for name, digest in files.items():
        try:
            data = read(folder / name)
            tensors |= load(data)
        except (OSError, SafetensorError) as error:
            raise InputError(f"{folder / name}: cut short or damaged ({error})") from error
        if digest is not None and _digest(data) != digest:
            raise InputError(f"{folder / name}: altered since it was written; train again")
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise InputError(f"{folder}: {name} holds NaN or inf; train again")
    try:
        tensors = from_codes(tensors)
        refuse_bad_tensors(tensors, presets, fingerprint)
    except InputError as error:
        raise InputError(f"{folder}: {error}; train again") from error
    return Artifact(fingerprint, presets, tensors, report)


def fingerprint(model: Any) -> dict[str, Any]:
    """What an artefact is tied to: architecture, shapes, and a hash over a sample of the weights.

    The sample is read as bf16, so that it does not depend on the dtype the model was loaded in.
    """
    digest = hashlib.sha256()
    samples = {n: (tuple(t.shape), _sample(t)) for n, t in model.named_parameters()}
    for name, layer in quantized_layers(model):
        # tied weights count once, with the embedding
        if not layer.tied:
            shape = (layer.out_features, layer.in_features)
            samples[f"{name}.weight"] = (shape, _sample_of_codes(layer.quantized, shape))
    for name, (shape, sample) in sorted(samples.items()):
        digest.update(f"{name}{shape}".encode())
        digest.update(sample.contiguous().view(torch.uint8).numpy().tobytes())
    config = model.config.get_text_config(decoder=True)
    return {
        "architecture": type(model).__name__,
        "layers": int(config.num_hidden_layers),
        "hidden": int(config.hidden_size),
        "vocabulary": int(config.vocab_size),
        "weights": digest.hexdigest()[:32],
    }


def _sample(tensor: Tensor) -> Tensor:
    flat = tensor.detach().reshape(-1)
    return flat[:: max(flat.numel() // SAMPLE, 1)][:SAMPLE].to("cpu", torch.bfloat16)


def _sample_of_codes(weight: QuantizedWeight, shape: tuple[int, int]) -> Tensor:
    """``_sample`` of the values of a quantised weight."""
    size = shape[0] * shape[1]
    index = torch.arange(0, size, max(size // SAMPLE, 1))[:SAMPLE]
    values = weight.values(torch.bfloat16, index // shape[1])
    return values[torch.arange(len(index)), index % shape[1]].cpu()
