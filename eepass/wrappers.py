"""The model inside what ``torch.compile`` and PEFT wrap around it, or why there is none."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from eepass.errors import InputError


def compiled_inside(model: Any) -> Any:
    """The module that ``torch.compile(model)`` wraps; ``model`` itself where it is no wrapper."""
    # whoever has such a wrapper has imported this, and nobody else need
    home = sys.modules.get("torch._dynamo.eval_frame")
    while home is not None and isinstance(model, home.OptimizedModule):
        model = model._orig_mod
    return model


def adapted_inside(model: Any) -> Any:
    """The module inside PEFT's and ``torch.compile``'s wrappers, whose layers hold the adapter;
    ``InputError`` where it is none of the layers'."""
    model = compiled_inside(model)
    while hasattr(model, "get_base_model"):
        config = getattr(model, "active_peft_config", None)
        if getattr(config, "is_prompt_learning", False):
            raise InputError(
                f"{type(model).__name__}: its adapter adds to the prompt, which eepass does not "
                "follow; adapters of layers (LoRA) are followed"
            )
        model = compiled_inside(model.get_base_model())
    return model


def original_inside(model: Any) -> Any:
    """The Hugging Face model inside all wrappers; ``InputError`` for what is none."""
    # PEFT's; its ``generate`` calls the inner model's
    model = adapted_inside(model)
    if isinstance(model, nn.Module) and hasattr(model, "generate"):
        return model
    raise no_model(model)


def no_model(given: Any) -> InputError:
    """Why ``given`` is no Hugging Face model, and what to give in its place."""
    name = type(given).__name__
    if hasattr(given, "splits"):
        return InputError(
            f"{name}: a transformed model, which decodes by itself (model.generate, eepass "
            "generate); give the original one"
        )
    if hasattr(given, "model") and hasattr(given, "tokenizer"):
        return InputError(f"{name}: what eepass.load returns holds the model: give its .model")
    return InputError(f"{name}: not a Hugging Face causal LM")
