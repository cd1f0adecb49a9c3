"""The decode step of a Hugging Face causal LM over a static cache, ready to be traced."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from eepass.errors import PassError
from eepass.masks import causal_mask
from eepass.passes.trace.capture import KvSlots, capture
from eepass.segments import DecoderGraph

# the function of transformers that models take their causal mask from
MASK_MAKER = "create_causal_mask"


@dataclass(slots=True)
class DecodeStep:
    """``step(ids [1, R], positions [1, R], masks) -> logits [1, R, V]``.

    ``windows`` says how far back each named mask lets a row look (None: to the start); masks named
    in ``unmasked`` are None. Where a model builds a bias from a mask [1, C] of slots, ``bias`` is
    that mask, and ``mask`` replaces the causal mask the model would make of it.
    """

    model: Any
    cache: Any
    windows: dict[str, int | None]
    unmasked: tuple[str, ...] = ()
    slots: list[KvSlots] = field(default_factory=list)
    bias: Tensor | None = None
    mask: Tensor | None = None

    def __call__(self, ids: Tensor, positions: Tensor, masks: dict[str, Tensor]) -> Tensor:
        mask: Any = masks["attention"] if list(masks) == ["attention"] else dict(masks)
        for name in self.unmasked:
            mask[name] = None
        if self.bias is not None:
            self.mask, mask = mask, self.bias
        return self.model(
            input_ids=ids, position_ids=positions, attention_mask=mask, past_key_values=self.cache,
            use_cache=True,
        ).logits  # fmt: skip

    def masks_given(self) -> AbstractContextManager[Any]:
        """Within, the model takes its causal mask from the step."""
        if self.bias is None:
            return nullcontext()
        return patch.object(_mask_module(self.model), MASK_MAKER, lambda *_, **__: self.mask)


def trace_decode_step(model: Any, rows: int, cache_length: int) -> DecoderGraph:
    """Trace ``model`` decoding ``rows`` tokens; raises ``PassError`` with the reason it cannot."""
    step = decode_step(model, cache_length)
    inputs = _example_inputs(step, rows, cache_length)
    # the parameters themselves, not detached: by identity Dynamo's inputs get their roles. A tensor
    # with two names keeps the first
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    with step.masks_given(), _fixed_frequencies(model):
        return capture(step, *inputs, tensors, step.slots, step.windows, known_positions(model))


@contextmanager
def _fixed_frequencies(model: Any) -> Iterator[None]:
    """Within, LongRoPE's frequencies are those of short texts, and so are the texts: choosing them
    anew in each step would write to a buffer of the model."""
    changing = [m for m in model.modules() if getattr(m, "rope_type", None) == "longrope"]
    for module in changing:
        module.rope_type = "default"
        module.inv_freq.copy_(module.original_inv_freq)
    try:
        yield
    finally:
        for module in changing:
            module.rope_type = "longrope"


def decode_step(model: Any, cache_length: int) -> DecodeStep:
    """The decode step of ``model`` with a zeroed static cache of ``cache_length`` slots."""
    refuse_non_decoder(model)
    config = model.config.get_text_config(decoder=True)
    # transformers takes seconds to import
    from eepass.passes.trace.step_cache import memory_of, step_cache

    step = DecodeStep(model, step_cache(config, cache_length), *mask_windows(model, config))
    reason = _first_token(step, cache_length)
    if reason and hasattr(_mask_module(model), MASK_MAKER) and list(step.windows) == ["attention"]:
        step.cache = step_cache(config, cache_length)
        step.bias = torch.ones(1, cache_length, dtype=torch.long, device=model.device)
        reason = _first_token(step, cache_length) and reason
    if reason:
        name = type(model).__name__
        raise PassError(f"one token through {name} with a static cache fails: {reason}")
    step.slots = memory_of(step.cache)
    if not any(kv.keys is not None for kv in step.slots):
        kept = "only recurrent states" if step.slots else "its past in no cache of keys and values"
        raise PassError(f"{type(model).__name__} keeps {kept}: it is no decoder with attention")
    return step


def _first_token(step: DecodeStep, cache_length: int) -> str:
    """Run one token eagerly, which shapes each layer's cache; the reason if that fails."""
    try:
        with torch.no_grad(), step.masks_given():
            step(*_example_inputs(step, 1, cache_length))
    except Exception as error:
        # whatever a model's code raises is a reason to refuse it
        return str(error) or type(error).__name__
    return ""


def _example_inputs(
    step: DecodeStep, rows: int, cache_length: int
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    like = next(step.model.parameters())
    device = like.device
    masks = {
        name: causal_mask(rows, cache_length, window, like.dtype, device)
        for name, window in step.windows.items()
    }
    ids = torch.zeros(1, rows, dtype=torch.long, device=device)
    return ids, torch.arange(rows, device=device)[None], masks


def _mask_module(model: Any) -> Any:
    return sys.modules[type(model.base_model).__module__]


def mask_windows(model: Any, config: Any) -> tuple[dict[str, int | None], tuple[str, ...]]:
    """The masks the model takes, by name, each with its window (mostly one, unnamed); and the names
    of those that must be None, as recurrent layers have nothing to mask."""
    window = getattr(config, "sliding_window", None)
    chunk = getattr(config, "attention_chunk_size", None)
    sizes = {"full_attention": None, "sliding_attention": window}
    sizes["chunked_attention"] = -chunk if chunk else None
    kinds = set(getattr(config, "layer_types", None) or ())
    recurrent = kinds - set(sizes)
    attention = sorted(kinds & set(sizes)) or ["full_attention"]
    sources = (inspect.getsource(kind.forward) for kind in {type(m) for m in model.modules()})
    if kinds and any("isinstance(causal_mask_mapping" in source for source in sources):
        unmasked = {*recurrent, "linear_attention"} if recurrent else ()
        return {kind: sizes[kind] for kind in attention}, tuple(sorted(unmasked))
    if len(attention) > 1:
        raise PassError(f"layers of kind {' and '.join(attention)} share one mask")
    if kinds:
        return {"attention": sizes[attention[0]]}, ()
    use = getattr(config, "use_sliding_window", True)
    return {"attention": window if use else None}, ()


def known_positions(model: Any) -> int | None:
    """How many positions ``model`` has, so how long a text may be; None where nothing bounds it.

    With LongRoPE that is the length the model was first trained on: for longer texts it uses other
    frequencies, from the first token on, so all keys in the cache would have to be computed again.
    """
    config = model.config.get_text_config(decoder=True)
    found = [getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len")]
    rope = getattr(config, "rope_parameters", None) or {}
    # one for each kind of layer, or one for all
    for each in (rope, *(value for value in rope.values() if isinstance(value, Mapping))):
        if each.get("rope_type") == "longrope":
            original = "original_max_position_embeddings"
            found += [each.get(original), getattr(config, original, None)]
    return min((count for count in found if isinstance(count, int) and count > 0), default=None)


def refuse_non_decoder(model: Any) -> None:
    """Raise ``PassError`` for models that are not causal decoders with a KV cache."""
    name, config = type(model).__name__, model.config
    if getattr(config, "is_encoder_decoder", False):
        raise PassError(f"{name} is an encoder-decoder model; eepass takes decoders")
    if model.get_output_embeddings() is None or not hasattr(model, "generate"):
        raise PassError(f"{name} is an encoder or has no LM head; use a causal LM")
    kinds = getattr(config.get_text_config(decoder=True), "layer_types", None) or ()
    if getattr(model, "_is_stateful", False) and not any(
        (kind.endswith("_attention") and kind != "linear_attention") or kind.startswith("hybrid")
        for kind in kinds
    ):
        kept = "a recurrent state instead of keys and values"
        raise PassError(f"{name} is a pure state-space model: it keeps {kept}")
