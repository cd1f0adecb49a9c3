"""What generated tokens attend to in a long text: some of its tokens, the same in many layers.

A text of no more than ``LONG * tokens`` tokens is attended to in full: selecting would gain little.
Of a longer one ``tokens`` are selected, among them always the first few, on which models rest the
attention they have no use for (Xiao et al., 2023), and the latest. Keys and values of all tokens
stay in the cache, so that the next pass may select others.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from eepass.runtime.decoder.decoder import Decoder
from eepass.runtime.decoder.side_inputs import Place
from eepass.runtime.engine.sequence import Sequence
from eepass.segments import ContextQuery

# the first tokens of a text, and the latest ones: as many as a pass has rows at most, pending ones
# included, and 32 before them
FIRST, LATEST = 4, 96
# a text of more than so many times the tokens that are selected is long
LONG = 2


class Text(NamedTuple):
    """A sequence of a pass: its ``rows``, by number, the position of the first, and that after the
    last."""

    sequence: Sequence
    rows: list[int]
    begin: int
    end: int


class Selection(ABC):
    """Selects ``tokens`` tokens of each long text, before each of some ``layers``; before the first
    of them a pass attends to all."""

    def __init__(self, tokens: int, layers: Iterable[int]) -> None:
        self.tokens, self.layers = tokens, frozenset(layers)
        # of a row's list, which holds all of a text that is not long
        self.slots = LONG * tokens

    def is_long(self, count: int) -> bool:
        """Whether some of a text of ``count`` tokens are selected."""
        return count > self.slots

    def select(
        self, layer: int, texts: list[Text], hidden: Tensor, place: Place
    ) -> dict[Sequence, Tensor]:
        """For each sequence the slots int32 [LONG * tokens] that its rows may attend to from
        ``layer`` on, in ascending order, -1 where there are fewer; nothing where no text is long.

        ``hidden`` [1, R, H]: of the pass, before that layer.
        """
        if not self.is_long(max(text.end for text in texts)):
            return {}
        queries = self._queries_of(layer, hidden, place)
        return {text.sequence: self._slots(layer, text, queries) for text in texts}

    def _slots(self, layer: int, text: Text, queries: Tensor | None) -> Tensor:
        slots = torch.full((self.slots,), -1, dtype=torch.int32)
        if not self.is_long(text.end):
            slots[: text.end] = torch.arange(text.end)
        else:
            latest, others = text.end - LATEST, self.tokens - FIRST - LATEST
            slots[:FIRST] = torch.arange(FIRST)
            slots[FIRST : FIRST + others] = self._choose(layer, text, queries, latest, others)
            slots[FIRST + others : self.tokens] = torch.arange(latest, text.end)
        return slots.where(slots < 0, slots + text.sequence.first_slot)

    def _queries_of(self, layer: int, hidden: Tensor, place: Place) -> Tensor | None:
        """The layer's queries [Q, R, D], where choosing takes them."""
        return None

    @abstractmethod
    def _choose(
        self, layer: int, text: Text, queries: Tensor | None, end: int, count: int
    ) -> Tensor:
        """``count`` of the positions from ``FIRST`` to ``end``, in ascending order."""


class Recent(Selection):
    """The latest tokens, as in StreamingLLM (Xiao et al., 2023)."""

    def __init__(self, tokens: int) -> None:
        super().__init__(tokens, [0])

    def _choose(
        self, layer: int, text: Text, queries: Tensor | None, end: int, count: int
    ) -> Tensor:
        return torch.arange(end - count, end)


class OwnAttention(Selection):
    """The tokens that some layers attend to most, for the layers after them: by the mean weights of
    all heads.

    As TidalDecode (arXiv 2410.05076) selects, so nothing has to be trained. The layer's queries are
    computed before it, so that it attends to its own selection.
    """

    def __init__(self, tokens: int, queries: Mapping[int, ContextQuery], decoder: Decoder) -> None:
        super().__init__(tokens, queries)
        self._queries, self._decoder = queries, decoder

    def _queries_of(self, layer: int, hidden: Tensor, place: Place) -> Tensor | None:
        return self._decoder.queries(layer, self.slots, hidden, place)

    def _choose(
        self, layer: int, text: Text, queries: Tensor | None, end: int, count: int
    ) -> Tensor:
        assert queries is not None
        query, first = self._queries[layer], text.sequence.first_slot
        keys = self._decoder.kv.keys[query.keys.layer][0, :, first : first + text.begin]
        by_group = queries[:, text.rows].unflatten(0, (len(keys), -1)).flatten(1, 2)
        # keys as weights of a linear layer
        scores = [
            torch.ops.eepass.logits_rows(own.contiguous(), those, None)
            for own, those in zip(by_group, keys, strict=True)
        ]
        weights = (torch.cat(scores) * query.scale).softmax(-1).sum(0)
        return weights[FIRST:end].topk(count).indices.sort().values + FIRST
