"""A model of the first layers of another, over the same modules: small enough to trace often."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from eepass.errors import PassError


def first_layers(model: Any, count: int) -> Any:
    """``model`` as it would be with ``count`` layers; its layers, embedding and head are shared.

    Layers are in module lists as long as the configuration has layers. Raises ``PassError`` where
    there is no such list, or the layers are those of a part of the model with a configuration of
    its own. Whether what is left is really a beginning of the model is for the caller to check.
    """
    config = model.config
    total = config.num_hidden_layers
    if config.get_text_config(decoder=True) is not config:
        raise PassError("the configuration of its layers is a part of another")
    lists = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == total
    ]
    if not lists:
        raise PassError(f"no list of {total} modules")
    shorter = copy.deepcopy(config)
    for name, value in vars(config).items():
        # of each layer its kind, for example
        if isinstance(value, list) and len(value) == total:
            setattr(shorter, name, value[:count])
    shorter.num_hidden_layers = count
    small = _shallow(model, config, shorter)
    for path in lists:
        owner = small
        *parents, last = path.split(".")
        for part in parents:
            inner = _shallow(getattr(owner, part), config, shorter)
            owner._modules[part] = inner
            owner = inner
        owner._modules[last] = nn.ModuleList(list(getattr(owner, last))[:count])
    return small


def _shallow(module: nn.Module, config: Any, shorter: Any) -> Any:
    """A copy of ``module`` with the same modules in it, and ``shorter`` for its ``config``."""
    made: Any = copy.copy(module)
    made.__dict__["_modules"] = dict(module._modules)
    if getattr(made, "config", None) is config:
        made.config = shorter
    return made
