"""A tiny model that eepass decodes, and both ways of generating with it."""

from __future__ import annotations

from typing import Any

import torch
from models import random_artifact, tiny_model

import eepass
from eepass.config import ExitConfig

PROMPT = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 5, 6, 7]])


def prepared_model() -> Any:
    """Tokens leave early and are drafted in every pass, whether it pays or not."""
    found = tiny_model("llama")
    # nothing ends by itself, unless a test says so
    found.generation_config.update(eos_token_id=None, pad_token_id=0)
    eepass.prepare(found, random_artifact(found), ExitConfig(adaptive=False), max_length=256)
    return found


def both(model: Any, ids: Any = PROMPT, **options: Any) -> tuple[Any, Any]:
    """What transformers says, and what eepass says."""
    options = {"max_new_tokens": 32, "do_sample": False, **options}
    return (
        model.generate(ids, custom_generate=None, **options),
        model.generate(ids, custom_generate=eepass.generate, **options),
    )


class Recorder:
    """A streamer that keeps what it is given."""

    def __init__(self) -> None:
        self.put_values, self.ended = [], 0

    def put(self, value: Any) -> None:
        self.put_values.append(value.clone())

    def end(self) -> None:
        self.ended += 1
