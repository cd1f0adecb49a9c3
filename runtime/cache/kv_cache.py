"""The static KV cache: slots, of which each sequence has a contiguous region."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from eepass.runtime.cache.regions import Regions


class KvCache:
    """Keys and values per layer, and which slots belong to a sequence.

    A token's slot is its position, counted from the first slot of its sequence. Other slots hold
    stale but finite values, masked until they are overwritten.
    """

    def __init__(self, like: Sequence[tuple[Tensor, Tensor]], scratch: int) -> None:
        """``like``: a key and a value tensor [1, G, C, D] per layer. The last ``scratch`` slots are
        for what padding rows write, and belong to no sequence."""
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        # of recurrent layers, by name
        self.states: dict[str, Tensor] = {}
        # layers of one shape share one tensor, so that moving rows is one operation for all
        self._stacks: list[tuple[list[int], Tensor]] = []
        for kind, found in ((0, self.keys), (1, self.values)):
            shapes = [pair[kind].shape for pair in like]
            by_layer: dict[int, Tensor] = {}
            for shape in dict.fromkeys(shapes):
                layers = [i for i, other in enumerate(shapes) if other == shape]
                example = like[layers[0]][kind]
                # zeros, never empty: a NaN in a masked slot would poison attention
                stack = torch.zeros(len(layers), *shape, dtype=example.dtype, device=example.device)
                self._stacks.append((layers, stack))
                by_layer |= dict(zip(layers, stack.unbind(), strict=True))
            found += [by_layer[layer] for layer in range(len(like))]
        self.scratch = self.slots - scratch
        self.regions = Regions(self.scratch)

    @property
    def slots(self) -> int:
        return int(self.keys[0].shape[2])

    @property
    def unused(self) -> bool:
        """Whether no slots are reserved."""
        return not self.regions.used

    def allocate(self, count: int) -> int | None:
        """Reserve ``count`` contiguous slots; the first of them, or None if there are none."""
        return self.regions.allocate(count)

    def fits(self, count: int) -> bool:
        """Whether another sequence may have ``count`` slots, once the others have moved."""
        return count <= self.regions.free

    def release(self, first: int) -> None:
        """Free the slots that were reserved from ``first`` on."""
        self.regions.release(first)

    def blank(self, layer: int, slots: Tensor) -> None:
        """Write zeros to ``slots`` [R]; later tokens attend to them, as in the paper's code."""
        self.keys[layer].index_fill_(2, slots, 0)
        self.values[layer].index_fill_(2, slots, 0)

    def move(self, sources: Sequence[int], first: int, depth: int) -> None:
        """Copy the slots ``sources`` to ``first`` onwards, in the first ``depth`` layers."""
        if list(sources) == list(range(first, first + len(sources))):
            return
        index = torch.tensor(sources, device=self.keys[0].device)
        for layers, stack in self._stacks:
            count = sum(layer < depth for layer in layers)
            part = stack[:count]
            part[:, :, :, first : first + len(sources)] = part[:, :, :, index]

    def move_rows(self, sources: Tensor, targets: Tensor) -> None:
        """Copy the slots ``sources`` [R] to the slots ``targets`` [R] in every layer, both on the
        device; a slot may be among both."""
        for _, stack in self._stacks:
            stack.index_copy_(3, targets, stack.index_select(3, sources))

    def copy(self, source: int, target: int, count: int) -> None:
        """Copy ``count`` slots from ``source`` on to ``target`` onwards, in every layer."""
        for _, stack in self._stacks:
            copy_rows(stack, 3, source, target, count)


def copy_rows(tensor: Tensor, dim: int, source: int, target: int, count: int) -> None:
    """Copy ``count`` rows along ``dim`` from ``source`` on to ``target`` onwards; they may
    overlap."""
    rows = tensor.narrow(dim, source, count)
    if abs(source - target) < count:
        rows = rows.clone()
    tensor.narrow(dim, target, count).copy_(rows)
