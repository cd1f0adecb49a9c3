"""What a configuration and an artefact come to: a plan of exits, and the tensors they read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from eepass.checkpoints.artifact import Artifact
from eepass.checkpoints.draft_codes import DIGITS
from eepass.config import ExitConfig
from eepass.errors import InputError
from eepass.plan import ExitPlan, ExitPoint
from eepass.segments import SplitDecoder

# in exact mode a wrong exit costs time alone, so the thresholds are lower
EXACT_TARGET = 0.9
# of a trained draft head
DRAFT_HEAD = "eagle.fc"


def settle(
    config: ExitConfig, artifact: Artifact | None, split: SplitDecoder, draft_model: bool
) -> tuple[ExitConfig, ExitPlan | None]:
    """``config`` as far as this model and artefact can follow it, and its exits (None without an
    artefact). ``draft_model``: whether there is one.

    Raises ``InputError`` where it asks for what they do not hold.
    """
    if split.stepwise and config.guarantee == "exact":
        # recurrent states cannot be rolled back
        config = replace(config, exits=False, draft="lens", speculate="off")
    elif split.stepwise or (split.counts_slots and config.speculate != "lens"):
        # where biases go by slot a tree of drafts would have wrong ones
        config = replace(config, speculate="off")
    if config.speculate == "model" and not draft_model:
        raise InputError("speculate='model': give transform a draft_model")
    if artifact is None or not artifact.presets:
        if config.guarantee == "approximate" and config.exits:
            raise InputError(
                "early exit needs an artefact with exits: run eepass train, or ask for exact"
            )
        source = config.speculate
        if artifact is None and source in ("cascade", "eagle"):
            source = "suffix"
        return replace(config, exits=False, draft="lens", speculate=source), None
    plan = make_plan(config, artifact, len(split.layers))
    source = config.speculate
    trained_head = source == "eagle" or (source in ("lens", "off") and config.draft == "eagle")
    if trained_head and DRAFT_HEAD not in artifact.tensors:
        raise InputError(
            f"speculate={source!r}: the artefact has no draft head; run eepass train "
            "--draft eagle, or ask for cascade or suffix"
        )
    return config, plan


def fits_captured_steps(config: ExitConfig) -> bool:
    """Whether a captured step of one token a pass, which is never rolled back, can decode so:
    dense, or approximate with drafts from a hidden state."""
    early = config.guarantee == "approximate" and config.draft != "eagle"
    plain = config.speculate in ("off", "lens") and config.context == "full"
    return plain and (early or not config.exits)


def fits_speculative_steps(config: ExitConfig) -> bool:
    """Whether a captured step that verifies draft tokens, exactly and without exits, can decode so:
    with draft tokens from the text, from a trained head, or from both."""
    drafts = config.speculate in ("suffix", "eagle", "cascade") and config.context == "full"
    return drafts and not config.exits


def fits_exiting_steps(config: ExitConfig) -> bool:
    """Whether a captured step that verifies draft tokens and exits can decode so: in every pass,
    for it measures nothing, and by draft tokens of its predictors from a hidden state."""
    drafts = fits_speculative_steps(replace(config, exits=False))
    return drafts and config.exits and not config.adaptive and config.draft != "eagle"


def make_plan(config: ExitConfig, artifact: Artifact, num_layers: int) -> ExitPlan:
    """The exits of an artefact under ``config``."""
    part = artifact.presets.get(config.name)
    if part is None:
        raise InputError(f"the artefact has no preset {config.name!r}: train again")
    exact = config.guarantee == "exact"
    calibration = part.at_target(EXACT_TARGET if exact else config.target_agreement)
    trained = artifact.exits(config.name)
    thresholds, ranking = calibration.thresholds, calibration.ranking
    if config.threshold is not None:
        thresholds = dict.fromkeys(trained, config.threshold)
        ranking = (*ranking, *(n for n in trained if n not in ranking))
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
    """The artefact's tensors under the names the passes use, and the hot rows of the LM
    head: as they are, and for the draft head the values they stand for."""
    prefix = f"predictor.{preset}."
    tensors = draft_tensors(artifact, model_tensors, split)
    head = model_tensors[split.head.weight].detach()
    for name, tensor in artifact.tensors.items():
        if name.startswith(prefix):
            tensors["predictor." + name[len(prefix) :]] = tensor.to(head.device)
        elif not name.startswith(("predictor.", "eagle.")):
            tensors[name] = _placed(name, tensor, split, head.device)
    tensors["hot.head"] = split.head.rows(head, tensors["hot.ids"]).contiguous()
    return tensors


def draft_tensors(
    artifact: Artifact, model_tensors: Mapping[str, Tensor], split: SplitDecoder
) -> dict[str, Tensor]:
    """The artefact's draft head, ``eagle.*``, with the rows of the LM head it reads; empty where
    there is none."""
    if DRAFT_HEAD not in artifact.tensors:
        return {}
    head = model_tensors[split.head.weight].detach()
    tensors = {
        name: _placed(name, tensor, split, head.device)
        for name, tensor in artifact.tensors.items()
        if name.startswith("eagle.")
    }
    if "eagle.hot.ids" not in tensors:
        hot = artifact.tensors["hot.ids"]
        tensors["eagle.hot.ids"] = _placed("hot.ids", hot, split, head.device)
    if "eagle.hot.head" not in tensors:
        hot, dtype = tensors["eagle.hot.ids"], split.hidden_example.dtype
        tensors["eagle.hot.head"] = split.head.row_values(head, hot, dtype)
    return tensors


def _placed(name: str, tensor: Tensor, split: SplitDecoder, device: torch.device) -> Tensor:
    """``tensor`` in the model's dtype on its device; digits that count stay."""
    kind = split.hidden_example.dtype if tensor.is_floating_point() else torch.long
    return tensor.to(device, torch.float32 if name in DIGITS else kind)
