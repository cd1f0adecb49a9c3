"""Rotary positions of a head: as a config describes them, and as inverse frequencies."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from eepass.errors import InputError
from eepass.runtime.drafting.eagle_layer import frequencies

PLAIN, SCALED = "default", ("linear", "llama3")


def rope_frequencies(rope: Mapping[str, Any], width: int) -> Tensor:
    """Inverse frequencies [width / 2] of ``rope_parameters``; ``InputError`` for a scaling that
    changes with the text, or more than the frequencies."""
    kind = rope["rope_type"]
    if kind == PLAIN:
        return frequencies(rope["rope_theta"], width)
    if kind not in SCALED:
        raise InputError(f"rope_type is {kind!r}: heads with default, linear or llama3 are read")
    from transformers import LlamaConfig

    from eepass.private_names import ROPE_INIT_FUNCTIONS

    try:
        described = LlamaConfig(head_dim=width, rope_parameters=dict(rope))
        found, _ = ROPE_INIT_FUNCTIONS[kind](described, torch.device("cpu"))
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise InputError(f"rope_parameters of the kind {kind!r} lack {error}") from error
    return found.float()


def rope_of(rotary: Tensor, said: Any) -> dict[str, Any]:
    """``rope_parameters`` that give the inverse frequencies ``rotary`` [R]: those ``said``, if they
    do, or plain ones of a base with few digits. Raises ``InputError`` where neither does."""
    width = 2 * len(rotary)
    # a report is for people: one of another form says nothing here
    with suppress(InputError, KeyError, TypeError, ValueError):
        if torch.equal(rope_frequencies(said, width), rotary):
            return dict(said)
    theta = float(rotary[1]) ** (-width / 2) if width > 2 else 10000.0
    for digits in range(1, 9):
        base = float(f"{theta:.{digits}g}")
        if torch.equal(frequencies(base, width), rotary):
            return {"rope_type": PLAIN, "rope_theta": base}
    raise InputError(f"the draft head's rotary frequencies are of no base near {theta:.0f}")
