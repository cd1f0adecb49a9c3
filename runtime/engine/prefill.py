"""Run a prompt through all layers, in chunks of row counts there is code for."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from eepass.runtime.decoder.decoder import Decoder
from eepass.runtime.decoder.side_inputs import Row
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
    features = sequence.features

    def keep(layer: int, hidden: Tensor) -> None:
        if on_layer is not None:
            on_layer(layer, hidden)
        if features is not None and layer in features.layers:
            features.keep(layer, hidden)

    if features is not None:
        features.begin(range(first + begin, first + end))
    rows = [Row(first, at, first + at) for at in range(begin, end)]
    tokens, limit = sequence.tokens[begin:end], first + sequence.capacity
    hidden = decoder.forward(tokens, rows, limit, keep, size)
    if features is not None:
        features.keep(None, hidden)
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
    draft.follow(sequence.tokens[begin:end])
    sequence.num_followed = end
