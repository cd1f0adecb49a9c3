"""Run a prompt through all layers, in chunks of the largest row count there is code for."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from eepass.runtime.decoder.decoder import Decoder
from eepass.runtime.decoder.side_inputs import Row
from eepass.runtime.engine.sequence import Sequence
from eepass.runtime.exits.exits import Exits

OnLayer = Callable[[int, Tensor], None]


def prefill(
    sequence: Sequence, decoder: Decoder, exits: Exits | None, on_layer: OnLayer | None = None
) -> Tensor:
    """Run the tokens of ``sequence``; the LM head logits [1, V] of the last one.

    The draft gets each chunk as soon as it is done, so that the hidden states of a whole prompt are
    never in memory at once. ``on_layer`` is called as in ``Decoder.forward``.
    """
    ids, chunk_size = sequence.tokens, decoder.buckets[-1]
    first, draft = sequence.first_slot, sequence.draft
    layers = draft.feature_layers if draft is not None else None
    by_layer: dict[int, Tensor] = {}
    hidden, previous = torch.zeros(0), None

    def keep(layer: int, hidden: Tensor) -> None:
        if on_layer is not None:
            on_layer(layer, hidden)
        if layers is not None and layer in layers:
            by_layer[layer] = hidden[0]

    for start in range(0, len(ids), chunk_size):
        chunk = ids[start : start + chunk_size]
        rows = [Row(first, at, first + at) for at in range(start, start + len(chunk))]
        hidden = decoder.forward(chunk, rows, first + sequence.capacity, keep)
        shifted = None
        if layers is not None:
            assert exits is not None
            features = torch.cat([exits.final(hidden)[0], *(by_layer[n] for n in layers)], -1)
            # each token comes with the features of the token before it, the first one with none
            previous = torch.zeros_like(features[:1]) if previous is None else previous
            shifted, previous = torch.cat([previous, features[:-1]]), features[-1:].clone()
        if draft is not None:
            draft.follow(chunk, shifted)
    if previous is not None:
        sequence.features[len(ids) - 1] = previous[0]
    return decoder.logits(hidden[:, -1:])[0]
