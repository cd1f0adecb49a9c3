"""Read a draft head that was trained elsewhere: safetensors and JSON, never a pickle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eepass.checkpoints.formats.stored import FLOATS, StoredTensors
from eepass.drafts.head_config import HeadConfig, read_config, refuse_layers
from eepass.drafts.head_tensors import LAYER, MIDLAYER, NAMES, with_z
from eepass.drafts.rope import rope_frequencies
from eepass.errors import InputError
from eepass.reading import parse_json
from eepass.runtime.drafting.eagle_form import EPSILON, WINDOW

CONFIG = "config.json"


@dataclass(frozen=True, slots=True)
class Target:
    """The model a head is for: ``depth`` layers of width ``hidden``, its ``embedding`` [V, H],
    ``lm_head`` [V, H], and the weight [H] of its final norm, None where that is no RMS norm."""

    depth: int
    hidden: int
    vocabulary: int
    embedding: Tensor
    lm_head: Tensor
    final_norm: Tensor | None


def read_head(
    folder: Path, target: Target, layers: tuple[int, ...] | None = None
) -> tuple[dict[str, Tensor], HeadConfig]:
    """The tensors ``eagle.*`` of the EAGLE-3 checkpoint in ``folder``, and what its config says.

    ``layers``: after which its features are taken, instead of what the config says. An embedding or
    an LM head that is the model's is left out. Raises ``InputError`` naming the file and the field
    or tensor that is missing, of another shape, or of another kind of head.
    """
    try:
        values = parse_json((folder / CONFIG).read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{folder / CONFIG}: cannot be read ({error})") from error
    if layers is not None:
        refuse_layers(list(layers), target.depth)
    try:
        config = read_config(values, target.depth, layers)
        _refuse_other_target(config, target)
    except InputError as error:
        raise InputError(f"{folder / CONFIG}: {error}") from error
    if not any(folder.glob("*.safetensors")) and any(folder.glob("*.bin")):
        raise InputError(f"{folder}: its weights are a pickle; save them as safetensors")
    try:
        head = _tensors(StoredTensors(folder), config, target)
        # of widths that the tensors have
        rotary = rope_frequencies(config.rope, config.head_width)
    except InputError as error:
        raise InputError(f"{folder}: {error}") from error
    head = {**head, **_fields(config), "rotary": rotary}
    if target.final_norm is not None:
        head = with_z(head, target.final_norm, target.depth) or head
    return {f"eagle.{name}": tensor for name, tensor in head.items()}, config


def _refuse_other_target(config: HeadConfig, target: Target) -> None:
    for name, found, wanted in (
        ("target_hidden_size", config.target_hidden, target.hidden),
        ("vocab_size", config.vocabulary, target.vocabulary),
    ):
        if found != wanted:
            raise InputError(f"{name} is {found}, and the model's is {wanted}")


def _tensors(stored: StoredTensors, config: HeadConfig, target: Target) -> dict[str, Tensor]:
    prefix = LAYER if LAYER + "mlp.up_proj.weight" in stored else MIDLAYER

    def take(name: str, *shape: int, of: tuple[torch.dtype, ...] = FLOATS) -> Tensor:
        return stored.take(name.replace(MIDLAYER, prefix), shape, *of)

    hidden, inner, own = config.hidden, config.inner, config.draft_vocabulary
    inputs, count = config.target_hidden * len(config.layers), len(config.layers)
    queries, keys = (n * config.head_width for n in (config.heads, config.groups))
    shapes = {
        "fc": (hidden, inputs), "q": (queries, 2 * hidden), "k": (keys, 2 * hidden),
        "v": (keys, 2 * hidden), "o": (hidden, queries), "gate": (inner, hidden),
        "up": (inner, hidden), "down": (hidden, inner), "token_norm": (hidden,),
        "hidden_norm": (hidden,), "mlp_norm": (hidden,), "norm": (hidden,),
    }  # fmt: skip
    head = {name: take(NAMES[name], *shape) for name, shape in shapes.items()}
    if config.fc_norm:
        norms = [take(f"fc_norm.{n}.weight", config.target_hidden) for n in range(count)]
        head["fc_norm"] = torch.cat([norm.float() for norm in norms])
    if config.norm_before_fc:
        head["input_norm"] = take(NAMES["input_norm"], inputs)
    if config.fc_norm and config.norm_before_fc:
        raise InputError("fc_norm and norm_before_fc: heads with one of them are read")
    head["hot.ids"] = _hot_ids(stored, config, target)
    for name, there, shape, known in (
        ("hot.head", "lm_head.weight", (own, hidden), target.lm_head),
        ("embedding", "embed_tokens.weight", (target.vocabulary, hidden), target.embedding),
    ):
        if there not in stored:
            if config.hidden != config.target_hidden:
                raise InputError(f"{there} is missing, and the model's is of another width")
            continue
        found = take(there, *shape)
        known = known[head["hot.ids"].long()] if name == "hot.head" else known
        if found.shape != known.shape or not torch.equal(found.to(known.dtype), known):
            head[name] = found
    if left := stored.left:
        raise InputError(f"{left[0]} is no tensor of a head that is read here")
    return head


def _hot_ids(stored: StoredTensors, config: HeadConfig, target: Target) -> Tensor:
    """The token of each row of the head's own LM head."""
    count, vocabulary = config.draft_vocabulary, target.vocabulary
    if "d2t" not in stored:
        if count != vocabulary:
            raise InputError(f"d2t is missing, and the head has {count} tokens of {vocabulary}")
        return torch.arange(count, dtype=torch.int32)
    whole = (torch.int64, torch.int32)
    ids = stored.take("d2t", (count,), *whole).long()
    ids = ids + torch.arange(count)
    if ids.min() < 0 or ids.max() >= vocabulary or len(ids.unique()) < count:
        raise InputError(f"d2t leads to tokens outside 0 to {vocabulary - 1}, or to one twice")
    if "t2d" in stored:
        known = stored.take("t2d", (vocabulary,), torch.bool)
        if not torch.equal(known.nonzero()[:, 0], ids.sort().values):
            raise InputError("t2d and d2t name other tokens")
    return ids.to(torch.int32)


def _fields(config: HeadConfig) -> Mapping[str, Tensor]:
    """Where the head is not as heads trained here are, and the layers of its features."""
    usual: dict[str, tuple[Any, Any]] = {
        "epsilon": (config.epsilon, EPSILON),
        "norm_before_residual": (config.norm_before_residual, True),
        "norm_output": (config.norm_output, True),
        "window": (config.window, WINDOW),
    }
    made = {n: torch.tensor([value]) for n, (value, known) in usual.items() if value != known}
    features = torch.tensor(config.layers, dtype=torch.int32)
    return {**made, "reads_z": torch.tensor([False]), "features": features}
