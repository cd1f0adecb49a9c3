"""What the stages say to one another: the pieces of a split decoder and the plan of its exits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.fx import GraphModule

InputKind = Literal[
    "ids",
    "positions",
    "mask",
    "hidden",
    "side",
    "parameter",
    "keys",
    "values",
    # what a recurrent layer carries from token to token, overwritten in place
    "state",
    # the slot each row is written to, [R]; layers differ where tokens wait for the deeper ones
    "slots",
    # of an exit point: the draft tokens, and their probabilities at the predictor before
    "draft",
    "previous",
]


@dataclass(frozen=True, slots=True)
class Input:
    """Role of one placeholder: its kind, a name unique within the kind, the KV layer it is of."""

    kind: InputKind
    name: str
    layer: int = -1


@dataclass(slots=True)
class Piece:
    """A part of the decoder as a graph: ``inputs`` are the roles of its placeholders, in order."""

    graph: GraphModule
    inputs: tuple[Input, ...]
    # equal for pieces with the same code, shapes, dtypes and roles: those compile once
    structure: str = ""


@dataclass(slots=True)
class DecoderGraph:
    """One traced decode step of ``rows`` tokens over a static KV cache of ``cache_length`` slots.

    ``tensors`` holds the parameters and buffers by name. ``positions``: how many the model knows,
    None where it counts on without end.
    """

    graph: GraphModule
    inputs: tuple[Input, ...]
    rows: int
    cache_length: int
    tensors: Mapping[str, Tensor]
    windows: Mapping[str, int | None]
    positions: int | None = None


@dataclass(slots=True)
class Head:
    """The way from the last boundary to the logits, as far as it could be taken apart.

    ``whole`` maps hidden [1, R, H] to logits [1, R, V]. Where the head is one linear layer,
    ``norm`` is what comes before it (traced with one row), ``weight`` and ``bias`` name its
    tensors, ``transform`` is what follows on the logits (a scale, a soft cap); else ``reason``
    says what stands in the way. Where it is quantised ``weight`` names its codes, beside
    ``scales`` and, if it has any, ``mins``; ``dynamic`` as in ``eepass.quantized_ops``.
    """

    whole: Piece
    norm: Piece | None = None
    weight: str = ""
    bias: str = ""
    transform: Piece | None = None
    reason: str = ""
    scales: str = ""
    mins: str = ""
    dynamic: bool = False

    @property
    def parts(self) -> dict[str, str]:
        """Names of what its weight is made of, by how such parts' names end."""
        named = {"": self.weight, ".scales": self.scales, ".mins": self.mins}
        return {end: name for end, name in named.items() if name}

    def values(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """Its weight [V, H]; where that is quantised, the values its codes stand for."""
        if not self.scales:
            return tensors[self.weight]
        parts = [tensors[name] if name else None for name in (self.weight, self.scales, self.mins)]
        values: Tensor = torch.ops.eepass.dequantize(*parts, dtype)
        return values

    def normed(self, hidden: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """The normed state z [1, n, H] of boundaries [1, n, H]: ``norm``, whatever rows it was
        traced with one of."""
        assert self.norm is not None
        # rows go as a batch: a trace may have its row count baked in
        rows = hidden.transpose(0, 1)
        values = [rows if r.kind == "hidden" else tensors[r.name] for r in self.norm.inputs]
        return self.norm.graph(*values).transpose(0, 1)


@dataclass(frozen=True, slots=True)
class HeadChain:
    """A head as data, what kernels are specialised for:

        x = norm(hidden) · (norm_weight + weight_offset) + norm_bias
        logits = (lm_head · x + head_bias) · logit_scale, then cap · tanh(logits / cap)

    Tensors by name, "" where there is none; ``logit_cap`` 0 means no cap.
    """

    norm: Literal["none", "rms", "layer"]
    eps: float
    norm_weight: str
    norm_bias: str
    weight_offset: float
    lm_head: str
    head_bias: str
    logit_scale: float = 1.0
    logit_cap: float = 0.0


@dataclass(frozen=True, slots=True)
class Channels:
    """Which outputs of a projection are the channels [G, D] of keys or values: ``first + g · head +
    d · step``. One projection may make queries, keys and values, in any of the usual orders."""

    first: int
    head: int
    step: int


@dataclass(frozen=True, slots=True)
class KvForm:
    """How a layer makes keys and values of a boundary, as ``eepass::fill_kv`` takes it.

    Tensors by name, "" where there is none; ``rotary`` channels turn by ``cos`` and ``sin``, side
    inputs of the layer, half against half or, ``interleaved``, each against the next. Projections
    are [O, H], or [H, O] where ``transposed``.
    """

    norm: Literal["none", "rms", "layer"]
    eps: float
    weight_offset: float
    norm_weight: str
    norm_bias: str
    key_weight: str
    key_bias: str
    value_weight: str
    value_bias: str
    head_norm: str
    head_bias: str
    head_form: Literal["none", "rms", "layer"]
    cos: str
    sin: str
    rotary: int
    interleaved: bool
    groups: int
    channels: int
    key_channels: Channels
    value_channels: Channels
    transposed: bool

    def projection(self, weight: Tensor, of: Channels) -> Tensor:
        """The rows of a projection that make ``of``, as a view [G, D, H]."""
        rows, columns = weight.stride()[::-1] if self.transposed else weight.stride()
        hidden = weight.shape[0 if self.transposed else 1]
        return weight.as_strided(
            (self.groups, self.channels, hidden), (of.head * rows, of.step * rows, columns),
            weight.storage_offset() + of.first * rows,
        )  # fmt: skip

    def bias(self, bias: Tensor, of: Channels) -> Tensor:
        """The part of a projection's bias that goes to ``of``, as a view [G, D]."""
        (step,) = bias.stride()
        return bias.as_strided(
            (self.groups, self.channels), (of.head * step, of.step * step),
            bias.storage_offset() + of.first * step,
        )  # fmt: skip


@dataclass(slots=True)
class SplitDecoder:
    """A decoder in pieces: ``prelude -> layers[0] -> ... -> layers[-1] -> head``.

    ``embed`` makes the first boundary and whatever else depends on token ids; ``positional`` makes
    the side inputs that depend on positions and mask alone. Their outputs are named in
    ``embed_outputs`` (the first is the boundary) and ``side_outputs``. ``kv_fills[i]`` is the part
    of layer i that writes its keys, values and states, nothing else. ``positions``: how many the
    model knows, None where it counts on without end.
    """

    rows: int
    cache_length: int
    tensors: Mapping[str, Tensor]
    embed: Piece
    embed_outputs: tuple[str, ...]
    positional: Piece
    side_outputs: tuple[str, ...]
    layers: tuple[Piece, ...]
    kv_fills: tuple[Piece, ...]
    head: Head
    windows: Mapping[str, int | None]
    how: str = ""
    # layers make biases or masks of slot numbers, so that a tree's tokens would stand wrongly
    counts_slots: bool = False
    positions: int | None = None

    @property
    def distinct_layers(self) -> int:
        return len({layer.structure for layer in self.layers})

    @property
    def stepwise(self) -> bool:
        """Whether layers carry states from token to token, which nothing takes back."""
        return any(role.kind == "state" for layer in self.layers for role in layer.inputs)

    @property
    def boundary(self) -> Tensor:
        """What a boundary looks like: a tensor without values [1, R, H]."""
        value: Tensor = self.layers[0].graph.graph.output_node().all_input_nodes[0].meta["val"]
        return value

    @property
    def hidden_size(self) -> int:
        return int(self.boundary.shape[-1])


@dataclass(frozen=True, slots=True)
class CallerStep:
    """A split decode step over a cache that is the caller's: its tensors come with each call.

    ``places``: where each role's tensor is among the call's tensors; ``passed``: side inputs that
    are such tensors as they come. ``caches``: places of keys and values, layer by layer.
    ``advance``: places of the lengths, and what the step adds to each when all layers have read
    it. ``batch``: sequences in the cache, each with one row. ``logits``: how they come out [B, 1,
    V]. ``stacked``: by row count R, the layers for R rows of one sequence, as a batch [R, 1, H].
    """

    split: SplitDecoder
    places: Mapping[Input, int]
    passed: Mapping[str, int]
    caches: tuple[int, ...]
    advance: tuple[tuple[int, int], ...]
    batch: int
    logits: Tensor
    stacked: Mapping[int, tuple[Piece, ...]]


@dataclass(slots=True)
class ExitPieces:
    """What runs at exit points besides layers, for R rows.

    ``predictors[layer]``: hidden, draft, previous -> probability [R], draft probabilities [R, K],
    normed state z [1, R, H] (fused ones say more after these). ``verify`` and ``draft``: z ->
    logits over the hot (or the whole) vocabulary, float32 [1, R, N]. ``normed``: boundary -> z at
    the draft's layer.
    """

    predictors: Mapping[int, Piece]
    verify: Piece
    draft: Piece
    normed: Piece


@dataclass(slots=True)
class FusedExits:
    """Exit points as one operator each, for R rows; ``chain`` is what they are specialised for.

    ``predictors[layer]``: hidden [1, R, H], draft, previous -> probability [R], draft probabilities
    [R, K], z [1, R, H], exits bool [R]. ``verify``: z, draft -> token [R], whether it is in the
    draft [R]; ``final``: the same from the last boundary. Both over the plan's vocabulary.
    ``draft``: z -> the draft tokens' log-probabilities and ids [R, K], the likeliest first.
    """

    chain: HeadChain
    predictors: Mapping[int, Piece]
    verify: Piece
    final: Piece
    draft: Piece


@dataclass(frozen=True, slots=True)
class ExitPoint:
    """A boundary after which a token may leave. ``layer`` counts layers run, 1-based."""

    layer: int
    translated: bool
    threshold: float


@dataclass(frozen=True, slots=True)
class ExitPlan:
    """Where a decoder may be left and how that is decided; what the passes and the engine share."""

    num_layers: int
    draft_layer: int
    draft_tokens: int
    exits: tuple[ExitPoint, ...]
    verify: Literal["hot", "full"]
    kv_policy: Literal["defer", "propagate", "drop"]
    ranking: tuple[int, ...] = field(default=())

    def threshold_tensors(self) -> dict[str, Tensor]:
        """The tensors fused predictors read their thresholds from, float32 [1]."""
        return {f"predictor.{p.layer}.threshold": torch.tensor([p.threshold]) for p in self.exits}

    def at(self, layer: int) -> ExitPoint | None:
        return next((point for point in self.exits if point.layer == layer), None)


def causal_mask(
    rows: int,
    cache_length: int,
    window: int | None,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    start: int = 0,
) -> Tensor:
    """Additive mask [1, 1, R, C] for rows at positions ``start`` onwards: 0 where a row may look.

    ``window``: how many tokens back, itself included; −n: in chunks of n tokens; None: all.
    Forbidden slots hold the dtype's lowest finite value: a row of −inf would become NaN.
    """
    positions = torch.arange(start, start + rows, device=device)
    return causal_mask_at(positions, cache_length, window, dtype)


def causal_mask_at(
    positions: Tensor, cache_length: int, window: int | None, dtype: torch.dtype
) -> Tensor:
    """``causal_mask`` for rows at ``positions`` [R], whatever they are."""
    row = positions[:, None]
    slot = torch.arange(cache_length, device=positions.device)[None]
    seen = slot <= row
    if window is not None:
        seen = seen & (slot > row - window if window > 0 else slot >= row - row % -window)
    mask = torch.zeros(seen.shape, dtype=dtype, device=positions.device)
    return mask.masked_fill(~seen, torch.finfo(dtype).min)[None, None]
