"""A model of a configuration whose parameters take no memory until weights are put in place."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class _Unallocated(TorchFunctionMode):
    """``torch.empty``, which parameters are made by, takes no memory."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = dict(kwargs or {})
        if func is torch.empty and options.get("device") is None:
            options["device"] = "meta"
        return func(*args, **options)


def empty_model(config: Any, dtype: torch.dtype) -> Any:
    """The causal LM of ``config`` with its parameters on the meta device.

    Buffers are there: they are computed from the configuration, and in no file.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    # without the first, a parameter would be allocated before the second took it away
    with _Unallocated(), init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
