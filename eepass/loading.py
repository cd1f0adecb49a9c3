"""``eepass.load``: a checkpoint, or a folder that ``eepass transform`` wrote."""

from __future__ import annotations

from pathlib import Path

import torch

from eepass.bundle.manifest import is_transformed
from eepass.checkpoints.models import DTYPES, LoadedModel, load_checkpoint
from eepass.checkpoints.quantized_weights import ACTIVATIONS
from eepass.checkpoints.read_torchao import KINDS
from eepass.errors import InputError


def load(
    spec: str,
    dtype: str | None = None,
    trust_native: bool = False,
    quantize: str | None = None,
    activations: str = "int8",
) -> LoadedModel:
    """Load ``spec`` in eval mode; raises ``InputError`` saying what is wrong with it.

    ``dtype``: bf16 if not given, and for a transformed folder what it was written in.
    ``trust_native``: also run the native code of a transformed folder this user did not sign.
    ``quantize``: ``"keep"`` a GGUF file's own quantisation, where there are kernels for it; or
    quantise the weights with torchao: ``"int8"``, ``"int4"``, ``"int8-dynamic"``. A checkpoint that
    torchao, AWQ, GPTQ or compressed-tensors quantised is read as it is. ``activations``: what is
    multiplied with quantised weights: ``"int8"``, rows rounded with a scale for each 32 or 256
    values, as llama.cpp rounds them, which is several times as fast; or ``"bf16"``, rows as they
    are.
    """
    if activations not in ACTIVATIONS:
        raise InputError(f"activations={activations!r}: known are {', '.join(ACTIVATIONS)}")
    if quantize not in (None, "keep", *KINDS):
        raise InputError(f"quantize={quantize!r}: known are keep, {', '.join(KINDS)}")
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r}: known are {', '.join(DTYPES)}")
    path = Path(spec)
    if is_transformed(path):
        if quantize not in (None, "keep"):
            raise InputError(f"{path} is a transformed folder: quantise the original")
        return _load_transformed(path, dtype, trust_native)
    return load_checkpoint(spec, dtype or "bf16", quantize, activations)


def _load_transformed(path: Path, dtype: str | None, trust_native: bool) -> LoadedModel:
    from eepass.bundle.load import load_folder

    model, tokenizer, written = load_folder(path, trust_native)
    if dtype is not None and DTYPES[dtype] != getattr(torch, written):
        raise InputError(f"dtype {dtype!r}: {path} was transformed in {written}; transform again")
    artifact = None if model.artifact is None else model.artifact_folder
    return LoadedModel(str(path), model, tokenizer, artifact, transformed=True)
