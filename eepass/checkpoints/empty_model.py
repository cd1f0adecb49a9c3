"""A model of a configuration whose parameters take no memory until weights are put in place."""

from __future__ import annotations

from typing import Any

import torch


def empty_model(config: Any, dtype: torch.dtype) -> Any:
    """The causal LM of ``config`` with its parameters on the meta device.

    Buffers are there: they are computed from the configuration, and in no file.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)
