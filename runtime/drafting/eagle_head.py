"""The draft head at run time: its keys and values, and its drafts on top of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from eepass.runtime.drafting.eagle_layer import (
    HEAD_WIDTH,
    LAYER,
    WINDOW,
    eagle_layer,
    mixed,
    rotary,
)  # fmt: skip
from eepass.segments import GraphToMake, Head

# the cache: first a slot for each draft token (the last one takes what padding rows write), then a
# ring of slots for confirmed tokens, a window and the largest chunk that is being added
TREE = 64
SPARE = TREE - 1
RING = WINDOW + 64


class EagleHead:
    """The draft head of one sequence: its confirmed tokens in a line, a tree of drafts after them.

    ``tensors``: ``eagle.*``, and ``hot.ids`` with ``hot.head``, those rows of the LM
    head, or ``eagle.hot.ids`` and so on where draft tokens have a hot vocabulary of their own.
    ``head``: the model's, where it is quantised. ``compile`` turns a graph into a
    function from the list of its inputs to its outputs, for each row count in ``rows`` when that is
    first needed; a compiler that only loads what is compiled needs no graph (``trace`` false).
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        embedding: Tensor,
        compile: Callable[..., Callable[[list[Tensor]], Sequence[Tensor]]],
        rows: Sequence[int] = (4, 8, 64),
        trace: bool = True,
        head: Head | None = None,
    ) -> None:
        dtype, hidden = embedding.dtype, embedding.shape[1]
        own = "eagle." if "eagle.hot.ids" in tensors else ""
        self.hot_ids = tensors[f"{own}hot.ids"]
        self.feature_layers: tuple[int, ...] = tuple(tensors["eagle.features"].tolist())
        self.length = 0
        self._embedding, self._compile, self._traces = embedding, compile, trace
        self.row_counts, self.dtype = tuple(sorted(rows)), dtype
        if self.row_counts[-1] > RING - WINDOW:
            raise ValueError(f"rows={rows}: at most {RING - WINDOW} at once")
        self._sources = {n: tensors[f"eagle.{n}"].to(dtype) for n in ("mix", "carry")}
        self._layer = [tensors[f"eagle.{name}"].to(dtype) for name in LAYER]
        # the width of the features of one token: F * H
        self.feature_size = int(self._sources["mix"].shape[1])
        heads = self._layer[LAYER.index("q")].shape[0] // HEAD_WIDTH
        keys = torch.zeros(1, heads, TREE + RING, HEAD_WIDTH, dtype=dtype)
        self._head = head if head is not None and head.quantized else None
        self._state = [self._empty_slots(), keys, torch.zeros_like(keys), tensors[f"{own}hot.head"]]
        self._steps: dict[tuple[str, int], Callable[[list[Tensor]], Sequence[Tensor]]] = {}
        # of the last confirmed token, then of the drafts in the order they were grown
        self._states = torch.zeros(TREE, hidden, dtype=dtype)
        self._attended = torch.zeros(TREE, TREE, dtype=torch.bool)
        self._depths = [0] * TREE
        self._num_drafts = 0
        # whether the first of the states is that of the last confirmed token
        self._extended = False

    @staticmethod
    def _empty_slots() -> Tensor:
        """Position of the token in each slot; later than any where there is none."""
        return torch.full((TREE + RING,), torch.iinfo(torch.long).max)

    def extend(self, tokens: Sequence[int], features: Tensor) -> Tensor:
        """Add confirmed tokens; log-probabilities float32 [N_hot] of what follows the last.

        features [n, F * H]: those of the token before each. Forgets all drafts.
        """
        if not tokens:
            raise ValueError("tokens is empty: there is nothing to extend by")
        largest = self.row_counts[-1]
        for begin in range(0, len(tokens), largest):
            chunk = list(tokens[begin : begin + largest])
            count, size = len(chunk), self._bucket(len(chunk))
            positions = torch.arange(self.length, self.length + size)
            slots = TREE + positions % RING
            slots[count:] = SPARE
            no_drafts = torch.zeros(size, TREE, dtype=torch.bool)
            given = features[begin : begin + count]
            last = torch.tensor([count - 1])
            states, scores = self._run(
                "mix", chunk, given, [positions, positions, slots, no_drafts, last]
            )
            self.length += count
        self._states[0] = states[count - 1]
        self._num_drafts, self._extended = 0, True
        return scores[0]

    def skip(self, count: int) -> None:
        """Count ``count`` confirmed tokens without running them: a whole window of others follows,
        so that no row attends to them."""
        self.length += count
        self._extended &= not count

    def grow(self, tokens: Sequence[int], parents: Sequence[int]) -> Tensor:
        """Add drafts; log-probabilities float32 [n, N_hot] of what follows each.

        ``parents``: the draft each follows, counted over all grown since ``extend``, or -1 for the
        last confirmed token. Drafts of one call do not follow one another.
        """
        first, count = self._num_drafts, len(tokens)
        size = self._bucket(count)
        if not self._extended:
            raise ValueError("drafts grow on a confirmed token: call extend first")
        if first + count > SPARE:
            raise ValueError(f"{first + count} drafts: there is room for {SPARE}")
        if not all(-1 <= parent < first for parent in parents) or len(parents) != count:
            raise ValueError(f"parents={list(parents)}: expected {count} of -1 to {first - 1}")
        above = torch.tensor(parents) + 1
        own = torch.arange(first, first + count)
        self._attended[own + 1] = self._attended[above]
        self._attended[own + 1, own] = True
        for draft, parent in enumerate(parents, first):
            self._depths[draft + 1] = self._depths[parent + 1] + 1
        depths = self._depths[first + 1 : first + count + 1]
        positions = torch.tensor([self.length - 1 + depth for depth in depths])
        slots = torch.full((size,), SPARE)
        slots[:count] = own
        inputs = [
            torch.full((size,), self.length - 1),
            F.pad(positions, (0, size - count)),
            slots,
            F.pad(self._attended[own + 1], (0, 0, 0, size - count)),
            torch.arange(size),
        ]
        states, scores = self._run("carry", list(tokens), self._states[above], inputs)
        self._states[own + 1] = states[:count]
        self._num_drafts += count
        return scores[:count]

    def truncate(self, length: int) -> None:
        """Forget all drafts, and the confirmed tokens beyond ``length``."""
        if not 0 <= length <= self.length:
            raise ValueError(f"length={length}: there are {self.length} confirmed tokens")
        self._extended &= length == self.length
        self.length, self._num_drafts = length, 0

    def fresh(self) -> EagleHead:
        """The same head for another sequence; what is compiled is shared."""
        other = copy(self)
        other._state = [self._empty_slots(), *(torch.zeros_like(x) for x in self._state[1:3])]
        other._state += self._state[3:]
        other._states = torch.zeros_like(self._states)
        other._attended = torch.zeros_like(self._attended)
        other._depths = [0] * TREE
        other.length = other._num_drafts = 0
        other._extended = False
        return other

    def _bucket(self, count: int) -> int:
        if not 0 < count <= self.row_counts[-1]:
            raise ValueError(f"{count} rows at once: expected 1 to {self.row_counts[-1]}")
        return next(size for size in self.row_counts if size >= count)

    def _run(
        self, source: str, tokens: list[int], feature: Tensor, inputs: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        size = len(inputs[0])
        padding = size - len(tokens)
        embedded = self._embedding[torch.tensor(tokens + tokens[-1:] * padding)]
        given = F.pad(feature.to(embedded.dtype), (0, 0, 0, padding))
        fixed = [*self._state, self._sources[source], *self._layer]
        arguments = [embedded, given, *inputs, *fixed]
        if (source, size) not in self._steps:
            # a trace takes one tensor given twice for one input
            examples = [x.clone() for x in arguments[: -len(fixed)]] + fixed
            shapes = [tuple(x.shape) for x in examples]
            packed = None
            if self._head is not None:
                packed = (self._head.form, len(self.hot_ids), self._head.activations)
            name = f"eagle.{source}.{shapes}.{embedded.dtype}{packed or ''}"
            graph = None
            if self._traces:
                graph = GraphToMake(partial(_trace, examples, source, packed))
            self._steps[source, size] = self._compile(graph, name, examples, logits=False)
        states, scores = self._steps[source, size](arguments)
        return states, scores


def _trace(
    examples: Sequence[Tensor], source: str, packed: tuple[int, int, int] | None
) -> GraphModule:
    """``packed``: form, outputs and activations of the hot rows of a quantised LM head."""

    def step(
        embedded: Tensor, feature: Tensor, last: Tensor, position: Tensor, slot: Tensor,
        tree: Tensor, scored: Tensor, positions: Tensor, keys: Tensor, values: Tensor,
        *weights: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Rows [R] that attend to the confirmed tokens up to position ``last`` [R] and to the
        drafts in ``tree`` [R, TREE]."""
        head, weight, layer = weights[0], weights[1], weights[2:]
        ring = positions.index_copy_(0, slot, position)[TREE:]
        line = (ring <= last[:, None]) & (ring > last[:, None] - WINDOW)
        attended = torch.cat([tree, line], 1)  # [R, TREE + RING]
        mask = torch.where(attended, 0.0, torch.finfo(embedded.dtype).min).to(embedded.dtype)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            written = keys.index_copy_(2, slot, k), values.index_copy_(2, slot, v)
            return F.scaled_dot_product_attention(q, *written, mask[None, None])

        cos, sin = rotary(position, embedded.dtype)
        added = mixed(feature, weight) if source == "mix" else F.linear(feature, weight)
        by_name = dict(zip(LAYER, layer, strict=True))
        states = eagle_layer(embedded[None], added[None], cos, sin, attend, by_name)[0]
        if packed is None:
            logits = torch.ops.eepass.logits_rows(states[scored], head, None)
        else:
            form, outputs, activations = packed
            logits = torch.ops.eepass.packed_logits(
                states[scored], head, form, outputs, None, activations
            )
        return states, logits.log_softmax(-1)

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes = [mode.from_tensor(x) for x in examples]
    with torch.no_grad():
        return make_fx(step, pre_dispatch=True)(*fakes)
