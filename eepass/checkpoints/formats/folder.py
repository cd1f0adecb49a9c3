"""A model from a folder of AWQ, GPTQ or compressed-tensors weights, without their libraries."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from eepass.checkpoints.empty_model import empty_model
from eepass.checkpoints.formats.awq import Awq
from eepass.checkpoints.formats.compressed_tensors import CompressedTensors
from eepass.checkpoints.formats.gptq import Gptq
from eepass.checkpoints.formats.stored import FLOATS, StoredTensors
from eepass.checkpoints.quantized_weights import QuantizedWeight, replace_linears
from eepass.errors import InputError


class Format(Protocol):
    """How quantised layers are stored. ``marks``: what one of them has in place of its weight."""

    @property
    def marks(self) -> tuple[str, ...]: ...

    def read(self, stored: StoredTensors, layer: str, outputs: int, inputs: int) -> QuantizedWeight:
        """The weight [outputs, inputs] of a linear layer; raises ``InputError``."""


FORMATS: dict[str, Callable[[Mapping[str, Any]], Format]] = {
    "awq": Awq.from_config,
    "gptq": Gptq.from_config,
    "compressed-tensors": CompressedTensors.from_config,
}
# what libraries wrote before there was a quantization_config in config.json
OLD_FILES = {"quant_config.json": "awq", "quantize_config.json": "gptq"}
# tensors of older checkpoints that models compute now
COMPUTED = r"rotary_emb\.inv_freq$|(^|\.)position_ids$"


def quantization_config(config: Any, folder: Path) -> dict[str, Any] | None:
    """How the weights in ``folder`` are quantised, if it is in one of ``FORMATS``.

    Raises ``InputError`` for a file that is not JSON.
    """
    found = getattr(config, "quantization_config", None)
    if found is None:
        for name, method in OLD_FILES.items():
            if (file := folder / name).is_file():
                try:
                    found = {"quant_method": method, **json.loads(file.read_text("utf-8"))}
                except (ValueError, TypeError) as error:
                    raise InputError(f"{file}: not a JSON object ({error})") from error
    found = found if isinstance(found, dict) or found is None else found.to_dict()
    return found if found and found.get("quant_method") in FORMATS else None


def load_quantized(
    spec: str, config: Any, quantization: Mapping[str, Any], dtype: torch.dtype, activations: int
) -> Any:
    """The causal LM of ``config`` with the weights in ``spec``, a folder or an id of Hugging Face.

    ``quantization``: what ``quantization_config`` found. Quantised linear layers are
    ``QuantizedLinear`` layers, all others have ``dtype``. ``activations`` as in
    ``eepass.ops.packed``. Raises ``InputError`` naming the tensor
    or the setting that cannot be read.
    """
    from transformers import GenerationConfig

    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = empty_model(config, dtype)
    folder = _downloaded(spec)
    try:
        form = FORMATS[quantization["quant_method"]](quantization)
        stored = StoredTensors(folder)
        weights = _quantized_weights(model, form, stored)
        if not weights:
            raise InputError(f"no linear layer has {' or '.join(form.marks)}")
        _fill(model, stored, weights.keys())
    except InputError as error:
        raise InputError(f"{spec}: {error}") from error
    replace_linears(model, weights, activations)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def _downloaded(spec: str) -> Path:
    if Path(spec).is_dir():
        return Path(spec)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(spec, allow_patterns=["*.safetensors", "*.json"]))


def _quantized_weights(
    model: Any, form: Format, stored: StoredTensors
) -> dict[str, QuantizedWeight]:
    """The weights of the linear layers that are quantised, by name; the layers keep none."""
    weights: dict[str, QuantizedWeight] = {}
    for name, linear in list(model.named_modules()):
        if not isinstance(linear, torch.nn.Linear):
            continue
        if not any(f"{name}.{mark}" in stored for mark in form.marks):
            continue
        try:
            weights[name] = form.read(stored, name, linear.out_features, linear.in_features)
        except InputError:
            raise
        except ValueError as error:
            raise InputError(f"{name}: {error}") from error
        if linear is model.get_output_embeddings():
            model.config.get_text_config(decoder=True).tie_word_embeddings = False
        bias = f"{name}.bias"
        if linear.bias is None and bias in stored:
            # AutoGPTQ gives every layer one, of zeros where the model has none
            values = stored.take(bias, (linear.out_features,), *FLOATS)
            if values.any():
                linear.bias = torch.nn.Parameter(values.to(linear.weight.dtype))
        linear.weight = torch.nn.Parameter(torch.empty(0, dtype=linear.weight.dtype))
    return weights


def _fill(model: Any, stored: StoredTensors, quantized: Any) -> None:
    """Load what is not quantised; ``InputError`` for what is missing and for what has no place."""
    placeholders = {f"{name}.weight" for name in quantized}
    wanted = {key: t for key, t in model.state_dict().items() if key not in placeholders}
    found = {}
    for key, tensor in wanted.items():
        if key in stored:
            kinds = FLOATS if tensor.is_floating_point() else (tensor.dtype,)
            found[key] = stored.take(key, tuple(tensor.shape), *kinds).to(tensor.dtype)
    model.load_state_dict(found, strict=False, assign=True)
    missing = wanted.keys() - found.keys()
    model.tie_weights(missing_keys=missing)
    if missing:
        raise InputError(f"the checkpoint has no {_first(sorted(missing))}")
    ignored = [COMPUTED, *(model._keys_to_ignore_on_load_unexpected or ())]
    left = [name for name in stored.left if not any(re.search(p, name) for p in ignored)]
    if left:
        experts = any("expert" in name for name in left)
        raise InputError(
            f"the model has no place for {_first(left)}"
            + (": experts that are quantised one by one are not read" if experts else "")
        )


def _first(names: list[str]) -> str:
    return names[0] + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")
