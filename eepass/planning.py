"""What a configuration and an artefact come to: the exits of a plan, and the tensors they read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from eepass.checkpoints.artifact import Artifact
from eepass.config import ExitConfig
from eepass.errors import InputError
from eepass.plan import ExitPlan, ExitPoint
from eepass.segments import SplitDecoder

# wrong guesses of exact mode cost time alone, so tokens leave more freely
EXACT_TARGET = 0.9


def without_guesses(config: ExitConfig, split: SplitDecoder) -> ExitConfig:
    """``config`` as far as it goes with ``split``: recurrent states take nothing back, and where
    slots are counted a tree of drafts stands wrongly."""
    if split.stepwise and config.guarantee == "exact":
        return replace(config, exits=False, draft="lens", speculate="off")
    if split.stepwise or (split.counts_slots and config.speculate != "lens"):
        return replace(config, speculate="off")
    return config


def without_artifact(config: ExitConfig, draft_model: bool) -> ExitConfig:
    """``config`` as far as it goes without anything trained; ``InputError`` if it asks for more."""
    if config.guarantee == "approximate":
        raise InputError("early exit needs an artefact: run eepass train, or ask for exact")
    source = config.speculate
    if source == "model" and not draft_model:
        raise InputError("speculate='model': give transform a draft_model")
    if source in ("cascade", "eagle"):
        source = "ngram"
    return replace(config, exits=False, draft="lens", speculate=source)


def make_plan(config: ExitConfig, artifact: Artifact, num_layers: int) -> ExitPlan:
    """The exits of an artefact under ``config``."""
    part = artifact.presets.get(config.name)
    if part is None:
        raise InputError(f"the artefact has no preset {config.name!r}: train again")
    exact = config.guarantee == "exact"
    calibration = part.at_target(EXACT_TARGET if exact else config.target_agreement)
    trained = artifact.exits(config.name)
    if config.threshold is None:
        thresholds = calibration.thresholds
        ranking = calibration.ranking
    else:
        thresholds = dict.fromkeys(trained, config.threshold)
        ranking = (*calibration.ranking, *(n for n in trained if n not in calibration.ranking))
    points = tuple(
        ExitPoint(layer, config.translators and f"translator.{layer}.down" in artifact.tensors, t)
        for layer, t in sorted(thresholds.items())
    )
    return ExitPlan(
        num_layers=num_layers,
        draft_layer=0 if config.draft == "eagle" else part.draft_layer,
        draft_tokens=part.draft_tokens,
        exits=points,
        verify=config.verify,
        kv_policy=config.kv,
        ranking=ranking,
    )


def exit_tensors(
    preset: str, artifact: Artifact, model_tensors: Mapping[str, Tensor], split: SplitDecoder
) -> dict[str, Tensor]:
    """The artefact's tensors under the names the passes use, and the hot rows of the LM head:
    of a quantised one, its codes' and scales' rows."""
    prefix = f"predictor.{preset}."
    tensors: dict[str, Tensor] = {}
    dtype = split.boundary.dtype
    device = next(model_tensors[part] for part in split.head.parts.values()).device
    for name, tensor in artifact.tensors.items():
        if name.startswith("predictor."):
            if name.startswith(prefix):
                tensors["predictor." + name[len(prefix) :]] = tensor.to(device)
        else:
            kind = dtype if tensor.is_floating_point() else torch.long
            tensors[name] = tensor.to(device, kind)
    for end, part in split.head.parts.items():
        rows = model_tensors[part].detach()
        for own in ("", "eagle."):
            if f"{own}hot.ids" in tensors:
                tensors[f"{own}hot.head{end}"] = rows[tensors[f"{own}hot.ids"]].contiguous()
    return tensors
