"""A decoder with recurrent layers: a token's update of a state cannot be undone.

So no row is ever padding, a draft token, or rolled back, and the rows of a pass go through a layer
one by one, in order. Tokens may still exit early and catch up later, since each layer's state only
needs all tokens in order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from eepass.runtime.cache.kv_cache import KvCache
from eepass.runtime.decoder.bound_segment import Compile
from eepass.runtime.decoder.decoder import Decoder
from eepass.runtime.decoder.side_inputs import Place
from eepass.segments import SplitDecoder

MOST_ROWS = 8


class StepwiseDecoder(Decoder):
    """Runs a split of one row; passes hold up to ``MOST_ROWS`` rows of one sequence."""

    def __init__(self, split: SplitDecoder, compile: Compile) -> None:
        super().__init__({1: split}, compile)
        self.buckets = tuple(range(1, MOST_ROWS + 1))

    def embed(self, ids: Tensor, positions: Tensor, slots: Tensor) -> Tensor:
        rows = [
            super(StepwiseDecoder, self).embed(*row)
            for row in zip(ids.split(1, 1), positions.split(1, 1), slots.split(1), strict=True)
        ]
        return torch.cat(rows, 1)

    def run_layer(self, layer: int, hidden: Tensor, place: Place, captured: bool = False) -> Tensor:
        rows = [
            super(StepwiseDecoder, self).run_layer(layer, row, self._one(place, index), captured)
            for index, row in enumerate(hidden.split(1, 1))
        ]
        return rows[0] if len(rows) == 1 else torch.cat(rows, 1)

    def _chain(self, rows: int, place: Place) -> None:
        """Rows go through a layer one by one."""

    def logits(self, hidden: Tensor) -> Tensor:
        return torch.cat([super(StepwiseDecoder, self).logits(h) for h in hidden.split(1, 1)], 1)

    def prepare(self, rows: int, captured: bool = False) -> None:
        super().prepare(1, captured)

    def prepare_head(self, rows: int) -> None:
        super().prepare_head(1)

    def _one(self, place: Place, index: int) -> Place:
        sides = {
            name: value.narrow(self.side_inputs.row_dim[name], index, 1)
            for name, value in place.sides.items()
        }
        return Place(place.slots[index : index + 1], sides)

    def _new_cache(self, like: Sequence[tuple[Tensor, Tensor]], scratch: int) -> KvCache:
        return RecurrentCache(like, scratch, self.splits[1])


class RecurrentCache(KvCache):
    """The cache of one sequence, whose states start from zero."""

    def __init__(
        self, like: Sequence[tuple[Tensor, Tensor]], scratch: int, split: SplitDecoder
    ) -> None:
        super().__init__(like, scratch)
        for layer in split.layers:
            for role, example in layer.examples.items():
                if role.kind == "state":
                    self.states[role.name] = torch.zeros(example.shape, dtype=example.dtype)

    def allocate(self, count: int) -> int | None:
        if not self.unused:
            return None
        for state in self.states.values():
            state.zero_()
        return super().allocate(count)

    def fits(self, count: int) -> bool:
        return self.unused and super().fits(count)
