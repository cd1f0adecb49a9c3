"""A traced decoder and the segments it is split into."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

InputKind = Literal[
    "ids", "positions", "mask", "hidden", "side", "parameter", "keys", "values",
    # what a recurrent layer carries from token to token, overwritten in place
    "state",
    # the slot each row is written to, [R]: its own for each layer, for a pending token has been
    # through the first layers only. As traced: how many tokens the layer's cache holds, a scalar
    "slots",
    # of an exit point: the draft tokens, and their probabilities at the previous predictor
    "draft", "previous",
]  # fmt: skip
T = TypeVar("T")
# A layer among layers that are called as one: its inputs, None for those that change with each
# pass; the place of the hidden state; the places of the others, and which of what changes they are
Link = tuple[list[Tensor | None], int, list[int], list[int]]
# number of the first layer, numbers of layers before which a hidden state is wanted, hidden state,
# what changes -> those hidden states
ChainedLayers = Callable[[int, list[int], Tensor, list[Tensor]], list[Tensor]]


@dataclass(frozen=True, slots=True)
class Input:
    """Role of one placeholder: its kind, a name unique within the kind, the KV layer it is of."""

    kind: InputKind
    name: str
    layer: int = -1


HIDDEN = Input("hidden", "hidden")
# the slots that rows may attend to, int32 [R, K], where layers are given a selection
CONTEXT = Input("side", "context")


class GraphToMake:
    """A graph that is made when it is first called or compiled: where its code is kept, never."""

    def __init__(self, make: Callable[[], GraphModule]) -> None:
        self._make = make

    @cached_property
    def graph(self) -> GraphModule:
        return self._make()

    def __call__(self, *inputs: Any) -> Any:
        return self.graph(*inputs)

    @staticmethod
    def made(graph: GraphModule | GraphToMake) -> GraphModule:
        """``graph`` itself, made if it is one to make."""
        return graph.graph if isinstance(graph, GraphToMake) else graph


@dataclass(slots=True)
class Segment:
    """A part of the decoder as a graph: ``inputs`` are the roles of its placeholders, in order.

    ``structure`` is equal for segments with the same code, shapes, dtypes and roles: those compile
    once.
    """

    graph: GraphModule
    inputs: tuple[Input, ...]
    structure: str = ""

    def arguments(self, value_of: Callable[[Input], T]) -> list[T]:
        """What the graph is called with: the value of each input's role, in order."""
        return [value_of(role) for role in self.inputs]

    def run(self, value_of: Callable[[Input], Any]) -> tuple[Any, ...]:
        """Call the graph as it is traced; its outputs, one or several, as a tuple."""
        result = self.graph(*self.arguments(value_of))
        return tuple(result) if isinstance(result, (tuple, list)) else (result,)

    @property
    def roles(self) -> dict[Node, Input]:
        """The role of each placeholder."""
        return dict(zip(self.graph.graph.find_nodes(op="placeholder"), self.inputs, strict=True))

    @property
    def examples(self) -> dict[Input, Any]:
        """What each input looks like: a tensor without values."""
        return {role: node.meta["val"] for node, role in self.roles.items()}

    @property
    def outputs(self) -> list[Node]:
        """The nodes whose values the graph returns, in order."""
        results: Any = self.graph.graph.output_node().args[0]
        return list(results) if isinstance(results, (tuple, list)) else [results]

    @property
    def parameters(self) -> list[str]:
        """Names of the parameters it reads, in order."""
        return [role.name for role in self.inputs if role.kind == "parameter"]


@dataclass(slots=True, kw_only=True)
class DecoderGraph(Segment):
    """One traced decode step of ``rows`` tokens over a static KV cache of ``cache_length`` slots.

    ``tensors`` holds the parameters and buffers by name; ``windows`` says how far back each mask
    lets a row look (None: all the way), ``positions`` how many the model has (None: any number).

    The rest is added by passes. ``hidden_states`` [0..L] are nodes: the input of the first layer,
    …, the output of the last; ``layers_found_by`` says how they were found. ``advance``: places of
    the cache lengths among the inputs, and what the step adds to each in place.
    """

    rows: int
    cache_length: int
    tensors: Mapping[str, Tensor]
    windows: Mapping[str, int | None]
    positions: int | None = None
    hidden_states: tuple[Node, ...] = ()
    layers_found_by: str = ""
    advance: tuple[tuple[int, int], ...] = ()


@dataclass(slots=True)
class Head:
    """From the last hidden state to the logits, as far as that could be taken apart.

    ``whole`` maps hidden [1, R, H] to logits [1, R, V]. Where the head is one linear layer,
    ``norm`` is what comes before it (traced with one row), ``weight`` and ``bias`` name its
    tensors, ``transform`` is what follows on the logits (a scale, a soft cap); else ``reason``
    says what stands in the way. Where it is quantised ``weight`` names a packed weight, and
    ``form``, ``outputs`` and ``activations`` are as in ``eepass.ops.packed``.
    """

    whole: Segment
    norm: Segment | None = None
    weight: str = ""
    bias: str = ""
    transform: Segment | None = None
    reason: str = ""
    form: int = 0
    outputs: int = 0
    activations: int = 0

    @property
    def quantized(self) -> bool:
        return self.outputs > 0

    def rows(self, weight: Tensor, ids: Tensor) -> Tensor:
        """The rows ``ids`` of ``weight``, its own: a weight of the same kind."""
        if not self.quantized:
            return weight[ids]
        return torch.ops.eepass.select_outputs(weight, self.form, ids)

    def row_values(self, weight: Tensor, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """``rows``; where they are quantised, the values they stand for."""
        rows = self.rows(weight, ids)
        if not self.quantized:
            return rows
        return torch.ops.eepass.unpack(rows, self.form, len(ids), None).to(dtype)

    def values(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """Its weight [V, H]; where that is quantised, the values it stands for."""
        weight = tensors[self.weight]
        if not self.quantized:
            return weight
        return torch.ops.eepass.unpack(weight, self.form, self.outputs, None).to(dtype)

    def normed(self, hidden: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """``norm`` of hidden states [1, n, H], for any n."""
        assert self.norm is not None
        # rows go as a batch: the trace may have its one row baked in
        rows = hidden.transpose(0, 1)
        (z,) = self.norm.run(lambda role: rows if role == HIDDEN else tensors[role.name])
        return z.transpose(0, 1)


@dataclass(slots=True)
class SplitDecoder:
    """A decoder in segments: ``prelude -> layers[0] -> ... -> layers[-1] -> head``.

    The prelude is two segments. ``embed`` makes hidden state 0 and the side inputs that depend on
    token ids (``embed_outputs``); ``positional`` makes the side inputs that depend on positions and
    masks alone (``side_outputs``). ``kv_fills[i]`` is the part of layer i that writes its keys,
    values and states, nothing else. ``positions``: how many the model has, None where nothing
    bounds them.
    """

    rows: int
    cache_length: int
    tensors: Mapping[str, Tensor]
    embed: Segment
    embed_outputs: tuple[str, ...]
    positional: Segment
    side_outputs: tuple[str, ...]
    layers: tuple[Segment, ...]
    kv_fills: tuple[Segment, ...]
    head: Head
    windows: Mapping[str, int | None]
    layers_found_by: str = ""
    # layers make biases or masks of slot numbers, which are wrong for the tokens of a tree
    counts_slots: bool = False
    positions: int | None = None

    @property
    def distinct_layers(self) -> int:
        return len({layer.structure for layer in self.layers})

    @property
    def stepwise(self) -> bool:
        """Whether layers carry states from token to token, which cannot be rolled back."""
        return any(role.kind == "state" for layer in self.layers for role in layer.inputs)

    @property
    def hidden_example(self) -> Tensor:
        """What a hidden state looks like: a tensor without values [1, R, H]."""
        return self.layers[0].outputs[0].meta["val"]

    @property
    def parameters(self) -> list[str]:
        """Names of what a dense pass reads whole: layers and head, not an embedding's rows."""
        read = {name for part in (*self.layers, self.head.whole) for name in part.parameters}
        return sorted(read)

    @property
    def bytes_a_pass(self) -> int:
        """Bytes of weights that a dense pass reads, each once however many layers share it."""
        read = {
            (tensor := self.tensors[name]).data_ptr(): tensor.nbytes for name in self.parameters
        }
        return sum(read.values())

    @property
    def hidden_size(self) -> int:
        return int(self.hidden_example.shape[-1])

    def prelude(self, value_of: Callable[[Input], Any]) -> dict[Input, Any]:
        """Hidden state 0 and the side inputs, from the step's inputs."""
        hidden, *token_sides = self.embed.run(value_of)
        names = (*self.embed_outputs[1:], *self.side_outputs)
        sides = zip(names, (*token_sides, *self.positional.run(value_of)), strict=True)
        return {HIDDEN: hidden, **{Input("side", name): value for name, value in sides}}

    def run(self, value_of: Callable[[Input], Any]) -> Any:
        """The logits of one step, segment by segment as they are traced."""
        made = self.prelude(value_of)
        for segment in (*self.layers, self.head.whole):
            (made[HIDDEN],) = segment.run(lambda r: made[r] if r in made else value_of(r))
        return made[HIDDEN]


@dataclass(frozen=True, slots=True)
class ContextQuery:
    """The queries of a layer, and the keys they are multiplied with: ``segment`` maps hidden
    [1, R, H] and side inputs to queries [1, Q, R, D], ``keys`` [1, G, C, D] are the cache's."""

    segment: Segment
    keys: Input
    scale: float


@dataclass(frozen=True, slots=True)
class ContextLayers:
    """The layers of a split decoder in a form that attends to selected slots (``CONTEXT``), and the
    queries, by layer, by which slots may be selected."""

    layers: tuple[Segment, ...]
    queries: Mapping[int, ContextQuery]


@dataclass(frozen=True, slots=True)
class CallerStep:
    """A split decode step over a cache that is the caller's: its tensors come with each call.

    ``places``: where each role's tensor is among the call's tensors; ``passed``: side inputs that
    are such tensors as they come. ``caches``: places of keys and values, layer by layer.
    ``advance``: places of the lengths, and what the step adds to each when all layers have read
    it. ``batch``: sequences in the cache, each with one row. ``logits``: what they look like [B, 1,
    V]. ``stacked``: by row count R, the layers for R rows of one sequence, as a batch [R, 1, H].
    """

    split: SplitDecoder
    places: Mapping[Input, int]
    passed: Mapping[str, int]
    caches: tuple[int, ...]
    advance: tuple[tuple[int, int], ...]
    batch: int
    logits: Tensor
    stacked: Mapping[int, tuple[Segment, ...]]

    def value_of(self, tensors: Sequence[Tensor]) -> Callable[[Input], Tensor]:
        """Look up the step's inputs among the ``tensors`` of a call."""
        return lambda role: tensors[
            self.passed[role.name] if role.kind == "side" else self.places[role]
        ]
