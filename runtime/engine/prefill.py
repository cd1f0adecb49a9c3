"""Run a prompt through all layers, in chunks of row counts there is code for."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from eepass.runtime.decoder.decoder import Decoder
from eepass.runtime.decoder.side_inputs import Row
from eepass.runtime.drafting.features import Features, joined
from eepass.runtime.engine.sequence import Sequence

OnLayer = Callable[[int, Tensor], None]


def run_chunk(
    sequence: Sequence,
    decoder: Decoder,
    most: int,
    on_layer: OnLayer | None = None,
) -> Tensor | None:
    """Run up to ``most`` of the tokens that ``sequence`` has to prefill; after the last of a prompt
    the LM head logits [1, V] of it, else None.

    The draft gets each chunk as soon as it is done, so that the hidden states of a whole prompt are
    never in memory at once. ``on_layer`` is called as in ``Decoder.forward``.
    """
    begin, first = sequence.num_prefilled or 0, sequence.first_slot
    left = min(most, sequence.num_to_prefill - begin)
    size = decoder.chunk(left, sequence.capacity - begin)
    end = begin + min(left, size)
    if begin == end:
        # another text has left all of it
        sequence.num_prefilled = None
        return None
    layers = sequence.draft.feature_layers if sequence.draft is not None else None
    by_layer: dict[int, Tensor] = {}

    def keep(layer: int, hidden: Tensor) -> None:
        if on_layer is not None:
            on_layer(layer, hidden)
        if layers is not None and layer in layers:
            by_layer[layer] = hidden[0]

    rows = [Row(first, at, first + at) for at in range(begin, end)]
    tokens, limit = sequence.tokens[begin:end], first + sequence.capacity
    hidden = decoder.forward(tokens, rows, limit, keep, size)
    if layers is not None:
        features = torch.cat([hidden[0], *(by_layer[n] for n in layers)], -1)
        sequence.features.write(first + begin, Features(features, [False] * (end - begin)))
    sequence.num_prefilled = end
    if not sequence.generated:
        _tell_draft(sequence)
    if end < sequence.num_to_prefill:
        return None
    sequence.num_prefilled = None
    return None if sequence.generated else decoder.logits(hidden[:, -1:])[0]


def _tell_draft(sequence: Sequence) -> None:
    """Let the draft follow what of the prompt is in the cache and new to it."""
    draft, begin, end = sequence.draft, sequence.num_followed, sequence.num_prefilled
    if draft is None or end is None:
        return
    shifted = None
    if draft.feature_layers is not None:
        # each token comes with the features of the token before it, the first one with none
        shifted = sequence.features_at(max(begin - 1, 0), end - max(begin, 1))
        if begin == 0:
            none = torch.zeros_like(sequence.features_at(0).rows)
            shifted = joined([Features.of(none), shifted])
    draft.follow(sequence.tokens[begin:end], shifted)
    sequence.num_followed = end
