"""``eepass.prepare``: a model whose own ``generate`` uses eepass."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from eepass.checkpoints.artifact import Artifact
from eepass.config import ExitConfig
from eepass.hf.generation import generate
from eepass.hf.prepared import register
from eepass.model import EarlyExitModel


def prepare(
    model: Any,
    artifact: str | Path | Artifact | None = "auto",
    config: ExitConfig | None = None,
    max_length: int | None = None,
) -> EarlyExitModel:
    """Transform ``model`` for its own ``generate``, which uses eepass from here on.

    ``artifact``: a folder written by ``eepass.train``, None for none, ``"auto"`` for the one beside
    the checkpoint or shipped with eepass. ``max_length``: prompt and answer together, in tokens;
    without it the cache is made anew when longer ones come, which compiles again. The result is
    kept as long as the model is; its ``statistics`` tell what decoding did.
    ``model.generate(..., custom_generate=None)`` is transformers' own way. Raises ``InputError``
    for a model or artefact that does not fit, with the reason.
    """
    transformed = register(model, artifact, config or ExitConfig(), max_length)
    # on this model alone: no other one, and no class of transformers, is changed
    model._extract_generation_mode_kwargs = functools.partial(_mode_kwargs, model)
    model.generate = functools.partial(type(model).generate, model, custom_generate=generate)
    return transformed


def _mode_kwargs(
    model: Any,
    custom_generate: Any,
    kwargs: dict[str, Any],
    synced_gpus: Any,
    assistant_model: Any,
    streamer: Any,
) -> dict[str, Any]:
    """What transformers hands to its own decoding methods, for ``eepass.generate`` as well: a
    callable given as ``custom_generate`` gets no streamer, and stop strings find no tokenizer."""
    options = (custom_generate, kwargs, synced_gpus, assistant_model, streamer)
    given = {
        "tokenizer": kwargs.get("tokenizer"),
        "assistant_model": assistant_model,
        "streamer": streamer,
    }
    found: dict[str, Any] = type(model)._extract_generation_mode_kwargs(model, *options)
    if custom_generate is generate:
        found |= {name: value for name, value in given.items() if value is not None}
    return found
