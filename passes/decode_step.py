"""The decode step of a Hugging Face causal LM over a static cache, ready to be traced.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eepass.passes.capture import KvSlots, capture
from eepass.passes.report import PassError
from eepass.plan import DecoderGraph, causal_mask


@dataclass(slots=True)
class DecodeStep:
    """``step(ids [1, R], positions [1, R], masks) -> logits [1, R, V]``; ``windows`` says how far
    back each named mask lets a row look (None: to the start)."""

    model: Any
    cache: Any
    slots: list[KvSlots]
    windows: dict[str, int | None]
    unmasked: tuple[str, ...] = ()

    def __call__(self, ids: Tensor, positions: Tensor, masks: dict[str, Tensor]) -> Tensor:
        mask: Any = masks["attention"] if list(masks) == ["attention"] else dict(masks)
        for name in self.unmasked:
            mask[name] = None
        output = self.model(
            input_ids=ids,
            position_ids=positions,
            attention_mask=mask,
            past_key_values=self.cache,
            use_cache=True,
        )
        return output.logits


def trace_decode_step(model: Any, rows: int, cache_length: int) -> DecoderGraph:
    """Trace ``model`` decoding ``rows`` tokens; raises ``PassError`` with the reason it cannot."""
    step = decode_step(model, cache_length)
    device = next(model.parameters()).device
    ids = torch.zeros(1, rows, dtype=torch.long, device=device)
    positions = torch.arange(rows, device=device)[None]
    dtype = next(model.parameters()).dtype
    masks = {
        name: causal_mask(rows, cache_length, window, dtype, device)
        for name, window in step.windows.items()
    }
    tensors = named_tensors(model)
    return capture(step, ids, positions, masks, tensors, step.slots, step.windows)


def decode_step(model: Any, cache_length: int) -> DecodeStep:
    """The decode step of ``model`` with a zeroed static cache of ``cache_length`` slots."""
    config = model.config.get_text_config(decoder=True)
    refuse_non_decoder(model)
    # transformers takes seconds to import
    from eepass.passes.step_cache import memory_of, step_cache

    cache = step_cache(config, cache_length)
    windows, unmasked = mask_windows(model, config)
    device = next(model.parameters()).device
    # a first eager token gives each layer's cache its true shape, whatever the architecture
    with torch.no_grad():
        try:
            model(
                input_ids=torch.zeros(1, 1, dtype=torch.long, device=device),
                past_key_values=cache,
                use_cache=True,
            )
        except Exception as error:
            raise PassError(
                f"one token through {type(model).__name__} with a static cache fails: {error}"
            ) from error
    slots = memory_of(cache)
    if not any(kv.keys is not None for kv in slots):
        raise PassError(f"{type(model).__name__} keeps no keys and values: {_instead(slots)}")
    return DecodeStep(model, cache, slots, windows, unmasked)


def _instead(slots: list[KvSlots]) -> str:
    return "it is a pure state-space model" if slots else "no layer writes to its cache"


def mask_windows(model: Any, config: Any) -> tuple[dict[str, int | None], tuple[str, ...]]:
    """The masks this model wants, by name, each with its window (one unnamed mask mostly); and the
    names of those it wants to be None: recurrent layers have nothing to mask."""
    window = getattr(config, "sliding_window", None)
    chunk = getattr(config, "attention_chunk_size", None)
    sizes = {
        "full_attention": None,
        "sliding_attention": window,
        "chunked_attention": -chunk if chunk else None,
    }
    kinds = set(getattr(config, "layer_types", None) or ())
    recurrent = kinds - set(sizes)
    attention = sorted(kinds & set(sizes)) or ["full_attention"]
    source = inspect.getsource(type(model.base_model).forward)
    if kinds and "isinstance(causal_mask_mapping" in source:
        unmasked = {*recurrent, "linear_attention"} if recurrent else ()
        return {kind: sizes[kind] for kind in attention}, tuple(sorted(unmasked))
    if len(attention) > 1:
        raise PassError(f"layers of kind {' and '.join(attention)} share one mask")
    if kinds:
        return {"attention": sizes[attention[0]]}, ()
    use = getattr(config, "use_sliding_window", True)
    return {"attention": window if use else None}, ()


def named_tensors(model: Any) -> Mapping[str, Tensor]:
    """Parameters and buffers by name; a tensor with two names keeps the first."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor.detach() if isinstance(tensor, torch.nn.Parameter) else tensor
    # Dynamo hands over the parameters themselves, so roles go by the originals
    return {name: _original(model, name) for name in tensors}


def _original(model: Any, name: str) -> Tensor:
    owner_name, _, attribute = name.rpartition(".")
    return getattr(model.get_submodule(owner_name), attribute)


def refuse_non_decoder(model: Any) -> None:
    """Raise ``PassError`` for models that are not causal decoders with a KV cache."""
    config = model.config
    if getattr(config, "is_encoder_decoder", False):
        raise PassError(
            f"{type(model).__name__} is an encoder-decoder model; eepass wants a decoder"
        )
    if model.get_output_embeddings() is None or not hasattr(model, "generate"):
        raise PassError(f"{type(model).__name__} is an encoder or has no LM head; use a causal LM")
