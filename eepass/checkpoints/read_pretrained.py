"""Load a folder or an id of Hugging Face through transformers, every tensor in its place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from eepass.checkpoints.formats import load_quantized, quantization_config
from eepass.checkpoints.holdings import Holdings, holdings_of
from eepass.errors import InputError, explained
from eepass.reading import parse_json

# dtypes of the weights in other libraries' quantised layers
PACKED = (torch.int32, torch.int16, torch.int8, torch.uint8, torch.float8_e4m3fn)


def load_pretrained(spec: str, dtype: torch.dtype, activations: int) -> tuple[Any, Any]:
    """The causal LM and the tokenizer of ``spec``. ``activations`` as in ``eepass.ops.packed``.

    Raises ``InputError`` for a configuration that asks for more than the files hold, for tensors
    that are missing, unexpected or of another shape, and for what is no causal decoder. No code
    that a checkpoint brings is run.
    """
    from transformers import AutoConfig, AutoTokenizer

    with explained(f"{spec}: the model cannot be read"):
        settings = _settings(spec)
        quantised = settings.get("quantization_config") is not None
        holdings = holdings_of(spec, quantised or _has_old_quantization(spec))
        holdings.refuse_layers(settings)
        config = AutoConfig.from_pretrained(spec, trust_remote_code=False)
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(f"{spec}: an encoder-decoder model; eepass wants a causal decoder")
    with explained(f"{spec}: the model cannot be loaded"):
        if quantization := quantization_config(config, Path(spec)):
            with holdings.bounding():
                model = load_quantized(spec, config, quantization, dtype, activations)
        else:
            model = _load_whole(spec, dtype, holdings)
        tokenizer = AutoTokenizer.from_pretrained(spec, trust_remote_code=False)
    _refuse_foreign_layers(model, spec)
    if not getattr(model, "is_decoder", False) and getattr(config, "is_decoder", None) is False:
        architectures: Sequence[str] = getattr(config, "architectures", None) or ()
        if any("MaskedLM" in name or name.endswith("Model") for name in architectures):
            raise InputError(f"{spec}: an encoder ({architectures[0]}), not a causal decoder")
    return model.eval().requires_grad_(False), tokenizer


def _settings(spec: str) -> Mapping[str, Any]:
    """The configuration as it is in the file: transformers builds lists as long as it says."""
    from transformers.utils import cached_file

    settings = parse_json(Path(str(cached_file(spec, "config.json"))).read_bytes())
    if not isinstance(settings, dict):
        raise ValueError("config.json is no JSON object")
    return settings


def _has_old_quantization(spec: str) -> bool:
    from eepass.checkpoints.formats.folder import OLD_FILES

    return any((Path(spec) / name).is_file() for name in OLD_FILES)


def _load_whole(spec: str, dtype: torch.dtype, holdings: Holdings) -> Any:
    """The model as transformers loads it; ``InputError`` for what it would make up or leave out."""
    from transformers import AutoModelForCausalLM

    with holdings.bounding():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            spec, dtype=dtype, trust_remote_code=False, output_loading_info=True,
            # reported below, by name
            ignore_mismatched_sizes=True,
        )  # fmt: skip
    model, info = loaded
    if mismatched := sorted(info["mismatched_keys"]):
        name, found, wanted = mismatched[0]
        raise InputError(
            f"{spec}: {name} is {_extents(found)}, and the configuration wants {_extents(wanted)}"
        )
    if missing := sorted(info["missing_keys"]):
        raise InputError(f"{spec}: it has no {first_of(missing)}")
    if unexpected := sorted(info["unexpected_keys"]):
        raise InputError(f"{spec}: the model has no place for {first_of(unexpected)}")
    for error in info.get("error_msgs") or ():
        raise InputError(f"{spec}: {error}")
    whole = model.state_dict() if holdings.integers else {}
    for name in holdings.integers:
        if name in whole and whole[name].is_floating_point():
            raise InputError(
                f"{spec}: {name} holds whole numbers, and config.json has no quantization_config "
                "that says what they stand for"
            )
    return model


def first_of(names: Sequence[str]) -> str:
    """The first of ``names``, and how many more there are."""
    return names[0] + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")


def _extents(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "a single number"


def _refuse_foreign_layers(model: Any, spec: str) -> None:
    """Raise for weights quantised by other libraries: their kernels cannot be traced."""
    method = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    if method is None or method.quant_method == "torchao":
        return
    for name, module in model.named_modules():
        tensors = (*module._parameters.values(), *module._buffers.values())
        if any(tensor is not None and tensor.dtype in PACKED for tensor in tensors):
            raise InputError(
                f"{spec}: its weights are quantised by {method.quant_method}, and {name} is a "
                f"{type(module).__name__}; eepass reads AWQ, GPTQ, compressed-tensors and torchao "
                "checkpoints and GGUF files: give one, or the model before it was quantised"
            )
