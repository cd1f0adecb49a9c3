"""Hugging Face models and their transformed decoders, kept as long as the model lives."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from weakref import ref

from eepass.checkpoints.artifact import Artifact
from eepass.checkpoints.fitting_artifact import found_artifact
from eepass.checkpoints.read_torchao import read_quantized
from eepass.config import ExitConfig
from eepass.errors import InputError
from eepass.lengths import refuse_longer, usual_length
from eepass.model import MAX_LENGTH, PREFILL_ROWS, EarlyExitModel, transform
from eepass.model_stamp import OWN, ModelStamp, refuse_unfollowed
from eepass.runtime.engine.batch import Request
from eepass.runtime.sampling import GREEDY

logger = logging.getLogger("eepass")


@dataclass(slots=True, eq=False)
class Prepared:
    """What belongs to one model; ``transformed`` is used with ``lock`` held.

    The model keeps it, so that both end together; a copy of the model has none.
    """

    # a weak reference to the model, None for nobody's
    of: Any = None
    artifact: str | Path | Artifact | None = "auto"
    config: ExitConfig = field(default_factory=ExitConfig)
    # None: grows as prompts and answers need it
    max_length: int | None = None
    transformed: EarlyExitModel | None = None
    # of the model as ``transformed`` was made from it
    stamp: ModelStamp | None = None
    # reentrant: a streamer may call generate
    lock: threading.RLock = field(default_factory=threading.RLock)

    def __deepcopy__(self, memo: Any) -> Prepared:
        return Prepared()

    def __reduce__(self) -> Any:
        return Prepared, ()


_registry_lock = threading.Lock()


def register(
    model: Any, artifact: str | Path | Artifact | None, config: ExitConfig, max_length: int | None
) -> EarlyExitModel:
    """Transform ``model`` anew, as asked for, and keep the result with it."""
    prepared = _entry(model)
    with prepared.lock:
        prepared.artifact, prepared.config, prepared.max_length = artifact, config, max_length
        prepared.transformed = None
        return _transformed(prepared, model, max_length or usual_length(model, MAX_LENGTH))


def _entry(model: Any) -> Prepared:
    with _registry_lock:
        return _found(model) or vars(model).setdefault(OWN, Prepared(ref(model)))


def _found(model: Any) -> Prepared | None:
    own = vars(model).get(OWN)
    if own is None or own.of is None or own.of() is not model:
        # none, or a copy of another model's
        vars(model).pop(OWN, None)
        return None
    return own


def is_prepared(model: Any) -> bool:
    """Whether ``model.generate`` uses eepass by itself."""
    with _registry_lock:
        return "generate" in vars(model) and _found(model) is not None


@contextmanager
def in_use(model: Any, length: int) -> Iterator[EarlyExitModel]:
    """The transformed ``model``, with room for ``length`` tokens; others wait for it meanwhile, but
    its loop goes on with what it was given.

    It is made at its first use. Raises ``InputError`` where ``length`` is more than ``prepare`` was
    asked for, or the model knows positions for.
    """
    prepared = _entry(model)
    with prepared.lock:
        yield _transformed(prepared, model, length)


def forget_requests(model: Any) -> None:
    """Let no draft of ``model`` repeat an earlier request, as its next engine decodes."""
    prepared = _entry(model)
    with prepared.lock:
        if prepared.config.remember:
            prepared.config = replace(prepared.config, remember=False)
            if prepared.transformed is not None:
                prepared.transformed.record(prepared.config)


def compile_now(model: Any) -> None:
    """Compile what a first ``generate`` would, and measure what passes cost."""
    with in_use(model, 1) as transformed:
        prompt = [0] * min(PREFILL_ROWS, transformed.decoder.max_sequence_length - 4)
        for _ in transformed.loop.submit([Request(prompt, 4, frozenset(), GREEDY)]):
            pass


def refuse_length(model: Any, length: int) -> None:
    """Raise ``InputError`` where ``length`` is more than ``prepare`` was asked for, or the model
    knows positions for; does not wait for the lock."""
    with _registry_lock:
        prepared = _found(model)
    if prepared is None:
        return
    if prepared.max_length is not None and length > prepared.max_length:
        raise InputError(
            f"prompt and answer need up to {length} tokens, and the model is prepared for "
            f"{prepared.max_length}: ask for fewer new tokens, or prepare(model, max_length=...)"
        )
    refuse_longer(model, length, "prompt and answer together")


def _transformed(prepared: Prepared, model: Any, length: int) -> EarlyExitModel:
    if getattr(model.config, "is_encoder_decoder", False):
        raise InputError(f"{type(model).__name__}: an encoder-decoder; eepass wants a decoder")
    if model.training:
        raise InputError("the model is in training mode: call model.eval() first")
    refuse_length(model, length)
    current = prepared.transformed
    if current is not None and (changed := _change(prepared, model)):
        logger.warning("%s has changed: transforming the model again", changed)
        current = None
    if current is not None and current.decoder.max_sequence_length < length:
        logger.warning(
            "%d tokens, and room for %d: transforming the model again; "
            "prepare(model, max_length=...) says beforehand how long texts get",
            length, current.decoder.max_sequence_length,
        )  # fmt: skip
        current = None
    if current is None:
        prepared.transformed = None
        refuse_unfollowed(model)
        read_quantized(model)
        longest = prepared.max_length
        if longest is None:
            longest = usual_length(model, max(MAX_LENGTH, 1 << (length - 1).bit_length()))
        own = prepared.artifact
        artifact = found_artifact(model) if own == "auto" else own
        current = transform(model, artifact, prepared.config, longest)
        prepared.transformed, prepared.stamp = current, ModelStamp(model)
    return current


def _change(prepared: Prepared, model: Any) -> str:
    return "" if prepared.stamp is None else prepared.stamp.change(model)
