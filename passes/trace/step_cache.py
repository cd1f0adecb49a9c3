"""The cache a decode step is traced over: full-length slots and recurrent states, all in place.

A sliding window lives in the mask alone, so that rows can be padded and rolled back without losing
keys. Positions, masks and slots alone say where the rows stand. The cache reports length 0 always,
so a model that reads it cannot tell tokens apart and is refused when its trace is checked.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import StaticCache

from eepass.errors import PassError
from eepass.passes.trace.capture import KvSlots
from eepass.private_names import (
    DummyLayer,
    LinearAttentionAndStaticFullAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)


class FullLengthLayer(StaticLayer):
    """Slots for the whole cache; reading its length, a tensor, would break the trace."""

    def get_seq_length(self) -> int:
        return 0


class RecurrentFullLengthLayer(LinearAttentionAndStaticFullAttentionLayer):
    """A layer with both keys and values for the whole cache, and states."""

    def get_seq_length(self) -> int:
        return 0


def step_cache(config: Any, cache_length: int) -> Any:
    """A static cache for one sequence of ``cache_length`` tokens; ``PassError`` where a layer keeps
    something else."""
    cache = StaticCache(config=config, max_cache_len=cache_length)
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, LinearAttentionCacheLayerMixin) and isinstance(layer, StaticLayer):
            states = layer.number_of_states
            cache.layers[index] = RecurrentFullLengthLayer(cache_length, number_of_states=states)
        elif type(layer) in (StaticLayer, StaticSlidingWindowLayer):
            cache.layers[index] = FullLengthLayer(cache_length)
        elif type(layer) not in (LinearAttentionLayer, DummyLayer):
            raise PassError(
                f"layer {index} keeps a {type(layer).__name__}, "
                "not keys, values and states that tokens overwrite in place"
            )
    return cache


def memory_of(cache: Any) -> list[KvSlots]:
    """What the layers of an initialised cache keep, zeroed; without those that keep nothing."""
    found = []
    for layer in cache.layers:
        attended: dict[str, Any] = {}
        states: list[Any] = []
        if isinstance(layer, StaticLayer) and layer.is_initialized:
            attended = {"keys": layer.keys, "values": layer.values}
            attended["start"] = layer.cumulative_length
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            states = [*layer.conv_states.values(), *layer.recurrent_states.values()]
            states = [state for state in states if isinstance(state, Tensor)]
        for tensor in (*attended.values(), *states):
            # an eager token may have left what looks alike: states start from nothing
            tensor.zero_()
        if attended or states:
            found.append(KvSlots(**attended, states=tuple(states)))
    return found
