"""The trained draft head: one decoder layer over what was said and what the model thought.

    x  = embed · norm(embedding of token t) + mix · [norm(feature) ...]     features of token t - 1
    x += attention(norm(x));  x += mlp(norm(x));  state = norm(x)
    the next token's log-probabilities = log_softmax(hot rows of the LM head · state)

The features of a confirmed token are the model's normed last state z and its boundaries after a
few earlier layers. A token that is itself a draft has none: there ``carry · state`` of the draft
before it takes their place. After EAGLE-3 (Li et al., 2025), with candidates from the hot
vocabulary alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

HEAD_WIDTH = 64
LAYER = ("embed", "q", "k", "v", "o", "gate", "up", "down", "norm1", "norm2", "norm3")
# a row sees so many confirmed tokens; training answers are no longer
WINDOW = 512
# the ring also holds the largest chunk on its way in
RING = WINDOW + 64
# slots before the ring: drafts, and the last of them takes what padding rows write
TREE = 64
SPARE = TREE - 1


def shapes(hidden: int, features: int = 1) -> dict[str, tuple[int, ...]]:
    """Shapes of the head's tensors for a model of width ``hidden``, with so many features."""
    width = max(hidden // HEAD_WIDTH, 1) * HEAD_WIDTH
    inner = -(-hidden * 8 // 3 // 64) * 64
    return {
        "embed": (hidden, hidden),
        "mix": (hidden, features * hidden),
        "carry": (hidden, hidden),
        "q": (width, hidden),
        "k": (width, hidden),
        "v": (width, hidden),
        "o": (hidden, width),
        "gate": (inner, hidden),
        "up": (inner, hidden),
        "down": (hidden, inner),
        "norm1": (hidden,),
        "norm2": (hidden,),
        "norm3": (hidden,),
    }


def rotary(positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine [R, 64] of rotary positions [R]."""
    half = torch.arange(0, HEAD_WIDTH, 2, device=positions.device).float()
    angle = positions.float()[:, None] * 10000.0 ** (-half / HEAD_WIDTH)
    angle = torch.cat([angle, angle], -1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def mixed(features: Tensor, mix: Tensor) -> Tensor:
    """What the features [..., F * H] of a confirmed token add to its row [..., H]."""
    apart = features.unflatten(-1, (-1, mix.shape[0]))
    return F.linear(_normed(apart).flatten(-2), mix)


def eagle_layer(
    embedded: Tensor,
    feature: Tensor,
    cos: Tensor,
    sin: Tensor,
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    weights: Mapping[str, Tensor],
) -> Tensor:
    """embedded [B, T, H], feature [B, T, H] (mixed or carried) -> state [B, T, H].

    ``attend`` takes q, k, v [B, heads, T, 64], rotary positions applied, and returns q's shape.
    """
    x = F.linear(_normed(embedded), weights["embed"]) + feature
    normed = _normed(x, weights["norm1"])
    batch, length, _ = x.shape
    q, k, v = (
        F.linear(normed, weights[name]).view(batch, length, -1, HEAD_WIDTH).transpose(1, 2)
        for name in "qkv"
    )
    seen = attend(_rotate(q, cos, sin), _rotate(k, cos, sin), v)
    x = x + F.linear(seen.transpose(1, 2).reshape(batch, length, -1), weights["o"])
    normed = _normed(x, weights["norm2"])
    inner = F.silu(F.linear(normed, weights["gate"])) * F.linear(normed, weights["up"])
    return _normed(x + F.linear(inner, weights["down"]), weights["norm3"])


class EagleDraft:
    """The draft head at work on one sequence: a line of confirmed tokens, a tree of drafts on top.

    ``tensors``: ``eagle.*``, and ``hot.ids`` with ``hot.head``, the rows of the LM head (of a
    quantised one with ``hot.head.scales`` and perhaps ``hot.head.mins``), or ``eagle.hot.ids`` and
    so on where drafts have a hot vocabulary of their own.
    ``compile`` turns a graph into a function from the list of its inputs to its outputs; that is
    done for each number of rows in ``rows`` when it is first needed; one that has compiled already
    wants no graph (``trace`` is false).
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        embedding: Tensor,
        compile: Callable[..., Callable[[list[Tensor]], Sequence[Tensor]]],
        rows: Sequence[int] = (4, 8, 64),
        trace: bool = True,
    ) -> None:
        dtype, hidden = embedding.dtype, embedding.shape[1]
        own = "eagle." if "eagle.hot.ids" in tensors else ""
        self.hot_ids = tensors[f"{own}hot.ids"]
        self.feature_layers: tuple[int, ...] = tuple(tensors["eagle.features"].tolist())
        self.length = 0
        self._embedding, self._compile, self._traces = embedding, compile, trace
        self._rows = tuple(sorted(rows))
        if self._rows[-1] > RING - WINDOW:
            raise ValueError(f"rows={rows}: at most {RING - WINDOW} at once")
        self._sources = {n: tensors[f"eagle.{n}"].to(dtype) for n in ("mix", "carry")}
        self._layer = [tensors[f"eagle.{name}"].to(dtype) for name in LAYER]
        heads = self._layer[LAYER.index("q")].shape[0] // HEAD_WIDTH
        keys = torch.zeros(1, heads, TREE + RING, HEAD_WIDTH, dtype=dtype)
        hot = [tensors.get(f"{own}hot.head{end}") for end in ("", ".scales", ".mins")]
        self._state = [self._unseen(), keys, torch.zeros_like(keys)]
        self._state += [part for part in hot if part is not None]
        self._steps: dict[tuple[str, int], Callable[[list[Tensor]], Sequence[Tensor]]] = {}
        # of the last confirmed token, then of the drafts in order of growth
        self._states = torch.zeros(TREE, hidden, dtype=dtype)
        self._sees = torch.zeros(TREE, TREE, dtype=torch.bool)
        self._depths = [0] * TREE
        self._grown = 0
        self._confirmed = False

    @staticmethod
    def _unseen() -> Tensor:
        """Position of the token in each slot: one not yet seen is later than any."""
        return torch.full((TREE + RING,), torch.iinfo(torch.long).max)

    def extend(self, tokens: Sequence[int], features: Tensor) -> Tensor:
        """Add confirmed tokens; log-probabilities float32 [N_hot] of what follows the last.

        features [n, F * H]: those of the token before each. Forgets all drafts.
        """
        if not tokens:
            raise ValueError("tokens is empty: there is nothing to extend by")
        largest = self._rows[-1]
        for begin in range(0, len(tokens), largest):
            chunk = list(tokens[begin : begin + largest])
            count, size = len(chunk), self._bucket(len(chunk))
            positions = torch.arange(self.length, self.length + size)
            slots = TREE + positions % RING
            slots[count:] = SPARE
            blind = torch.zeros(size, TREE, dtype=torch.bool)
            given = features[begin : begin + count]
            last = torch.tensor([count - 1])
            states, scores = self._run(
                "mix", chunk, given, [positions, positions, slots, blind, last]
            )
            self.length += count
        self._states[0] = states[count - 1]
        self._grown, self._confirmed = 0, True
        return scores[0]

    def skip(self, count: int) -> None:
        """Count ``count`` confirmed tokens without running them: a window of others follows, and
        no row will see them."""
        self.length += count
        self._confirmed &= not count

    def grow(self, tokens: Sequence[int], parents: Sequence[int]) -> Tensor:
        """Add drafts; log-probabilities float32 [n, N_hot] of what follows each.

        ``parents``: the draft each follows, counted over all grown since ``extend``, or -1 for the
        last confirmed token. Drafts of one call do not follow one another.
        """
        first, count = self._grown, len(tokens)
        size = self._bucket(count)
        if not self._confirmed:
            raise ValueError("drafts grow on a confirmed token: call extend first")
        if first + count > SPARE:
            raise ValueError(f"{first + count} drafts: there is room for {SPARE}")
        if not all(-1 <= parent < first for parent in parents) or len(parents) != count:
            raise ValueError(f"parents={list(parents)}: expected {count} of -1 to {first - 1}")
        above = torch.tensor(parents) + 1
        own = torch.arange(first, first + count)
        self._sees[own + 1] = self._sees[above]
        self._sees[own + 1, own] = True
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
            F.pad(self._sees[own + 1], (0, 0, 0, size - count)),
            torch.arange(size),
        ]
        states, scores = self._run("carry", list(tokens), self._states[above], inputs)
        self._states[own + 1] = states[:count]
        self._grown += count
        return scores[:count]

    def truncate(self, length: int) -> None:
        """Forget all drafts, and the confirmed tokens beyond ``length``."""
        if not 0 <= length <= self.length:
            raise ValueError(f"length={length}: there are {self.length} confirmed tokens")
        self._confirmed &= length == self.length
        self.length, self._grown = length, 0

    def fresh(self) -> EagleDraft:
        """The same head for another sequence; what is compiled is shared."""
        other = copy(self)
        other._state = [self._unseen(), *(torch.zeros_like(x) for x in self._state[1:3])]
        other._state += self._state[3:]
        other._states, other._sees = torch.zeros_like(self._states), torch.zeros_like(self._sees)
        other._depths = [0] * TREE
        other.length = other._grown = 0
        other._confirmed = False
        return other

    @property
    def row_counts(self) -> tuple[int, ...]:
        return self._rows

    @property
    def hidden_dtype(self) -> torch.dtype:
        return self._embedding.dtype

    @property
    def feature_size(self) -> int:
        """Width of the features of one token: F · H."""
        return int(self._sources["mix"].shape[1])

    def _bucket(self, count: int) -> int:
        if not 0 < count <= self._rows[-1]:
            raise ValueError(f"{count} rows at once: expected 1 to {self._rows[-1]}")
        return next(size for size in self._rows if size >= count)

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
            kinds = [str(x.dtype) for x in self._state[3:]] if len(self._state) > 4 else ""
            name = f"eagle.{source}.{shapes}.{embedded.dtype}{kinds}"
            parts = len(self._state) - 3
            graph = _trace(examples, source, parts) if self._traces else None
            self._steps[source, size] = self._compile(graph, name, examples, logits=False)
        states, scores = self._steps[source, size](arguments)
        return states, scores


def _trace(examples: Sequence[Tensor], source: str, parts: int) -> GraphModule:
    """``parts``: how many tensors the hot rows of the LM head are; more than one are quantised."""

    def step(
        embedded: Tensor, feature: Tensor, known: Tensor, position: Tensor, slot: Tensor,
        tree: Tensor, scored: Tensor, held: Tensor, keys: Tensor, values: Tensor, *given: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Rows [R]; each sees the confirmed tokens up to ``known`` [R] and ``tree`` [R, TREE]."""
        head, weight, layer = given[:parts], given[parts], given[parts + 1 :]
        ring = held.index_copy_(0, slot, position)[TREE:]
        line = (ring <= known[:, None]) & (ring > known[:, None] - WINDOW)
        seen = torch.cat([tree, line], 1)  # [R, TREE + RING]
        mask = torch.where(seen, 0.0, torch.finfo(embedded.dtype).min).to(embedded.dtype)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            written = keys.index_copy_(2, slot, k), values.index_copy_(2, slot, v)
            return F.scaled_dot_product_attention(q, *written, mask[None, None])

        cos, sin = rotary(position, embedded.dtype)
        begun = mixed(feature, weight) if source == "mix" else F.linear(feature, weight)
        by_name = dict(zip(LAYER, layer, strict=True))
        states = eagle_layer(embedded[None], begun[None], cos, sin, attend, by_name)[0]
        if parts == 1:
            logits = torch.ops.eepass.logits_rows(states[scored], *head, None)
        else:
            lows = head[2] if parts > 2 else None
            logits = torch.ops.eepass.quantized_logits(states[scored], *head[:2], lows, None, False)
        return states, logits.log_softmax(-1)

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes = [mode.from_tensor(x) for x in examples]
    with torch.no_grad():
        return make_fx(step, pre_dispatch=True)(*fakes)


def _normed(x: Tensor, weight: Tensor | None = None) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, 1e-5)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = HEAD_WIDTH // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin
