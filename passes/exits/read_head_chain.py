"""Read the way from the last boundary to the logits out of the graph, as data.

    before   graphs of ``Head.norm`` and ``Head.transform``
    after    HeadChain(norm="rms", eps=1e-6, weight_offset=1.0, logit_cap=30.0, ...)

Each node is followed by what it means ("the mean of the squares", "normed, with this weight"), not
by its place in a pattern, so the order of factors and conversions between dtypes do not matter.
What means nothing in a norm, a scale or a soft cap is refused, by the node.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch.fx import Node

from eepass.errors import PassError
from eepass.kernel_forms import HeadChain
from eepass.segments import Head, Segment

aten = torch.ops.aten

SAME = {
    aten.to.dtype, aten._to_copy.default, aten.alias.default, aten.type_as.default,
    aten.view.default, aten.reshape.default, aten.clone.default, aten.contiguous.default,
    aten.detach.default,
}  # fmt: skip


@dataclass(frozen=True)
class State:
    """The boundary, or the boundary less its mean."""

    centred: bool = False


@dataclass(frozen=True)
class _Moment:
    """What is computed of a state on the way to 1/deviation."""

    of: Literal["mean", "square", "mean square", "variance", "deviation", "inverse"]
    centred: bool = False
    eps: float = 0.0


@dataclass(frozen=True)
class Weight:
    name: str
    offset: float = 0.0


@dataclass(frozen=True)
class Normed:
    norm: Literal["none", "rms", "layer"]
    eps: float
    weight: Weight | None = None
    bias: str = ""


@dataclass(frozen=True)
class _Logits:
    """cap · tanh(scale · logits / cap), or scale · logits."""

    scale: float = 1.0
    cap: float = 0.0


Meaning = State | _Moment | Weight | Normed | _Logits


def read_head_chain(head: Head) -> HeadChain:
    """``head`` as data; raises ``PassError`` with the node that does not fit."""
    if head.norm is None:
        raise PassError(head.reason or "the head could not be taken apart")
    if head.scales:
        raise PassError("the LM head is quantised, and its kernels read plain rows")
    found = _follow(head.norm, State(), _norm_step)
    if isinstance(found, State) and not found.centred:
        found = Normed("none", 0.0)
    if not isinstance(found, Normed):
        raise PassError("what comes before the LM head is no norm")
    logits: Meaning = _Logits()
    if head.transform is not None:
        logits = _follow(head.transform, _Logits(), _logit_step)
    assert isinstance(logits, _Logits)
    weight = found.weight or Weight("")
    return HeadChain(
        found.norm, found.eps, weight.name, found.bias, weight.offset, head.weight, head.bias,
        logits.scale, logits.cap,
    )  # fmt: skip


Step = Callable[[Any, list[Any]], Meaning | None]


def norms_within(segment: Segment) -> dict[Node, tuple[Normed, str, str, float]]:
    """The nodes of ``segment`` that hold its hidden input normed: kind and eps, names of weight and
    bias, what is added to the weight. Nodes of other meanings are passed over."""
    found = {}
    for node, meaning in _meanings(segment, State(), _norm_step, refuse=False).items():
        if isinstance(meaning, State) and not meaning.centred:
            meaning = Normed("none", 0.0)
        if isinstance(meaning, Normed):
            weight = meaning.weight or Weight("")
            found[node] = (meaning, weight.name, meaning.bias, weight.offset)
    return found


def _follow(segment: Segment, start: Meaning, step: Step) -> Meaning:
    meanings = _meanings(segment, start, step, refuse=True)
    result = segment.graph.graph.output_node().args[0]
    result = result[0] if isinstance(result, (tuple, list)) else result
    assert isinstance(result, Node)
    return meanings[result]


def _meanings(segment: Segment, start: Meaning, step: Step, refuse: bool) -> dict[Node, Meaning]:
    meanings: dict[Node, Meaning] = {}
    graph = segment.graph.graph
    for node, role in zip(graph.find_nodes(op="placeholder"), segment.inputs, strict=True):
        if role.kind in ("hidden", "parameter"):
            meanings[node] = start if role.kind == "hidden" else Weight(role.name)
    for node in graph.nodes:
        if node.op == "call_function":
            given = [meanings.get(a, a) if isinstance(a, Node) else a for a in node.args]
            meaning = given[0] if node.target in SAME else step(node.target, given)
            if isinstance(meaning, Meaning):
                meanings[node] = meaning
            elif refuse:
                raise PassError(f"{node.target} ({node.name}) is no step of a known head")
    return meanings


def _norm_step(target: Any, given: list[Any]) -> Meaning | None:
    if target in (aten.layer_norm.default, aten.rms_norm.default):
        return _whole_norm(target, given)
    match given:
        case [State(centred), 2 | 2.0] if target is aten.pow.Tensor_Scalar:
            return _Moment("square", centred)
        case [State(a), State(b)] if target is aten.mul.Tensor and a == b:
            return _Moment("square", a)
        case [State(False), [-1], True] if target is aten.mean.dim:
            return _Moment("mean")
        case [_Moment("square", centred), [-1], True] if target is aten.mean.dim:
            return _Moment("mean square", centred)
        case [State(False), _Moment("mean")] if target is aten.sub.Tensor:
            return State(centred=True)
        case [_Moment("mean square", centred), float(eps)] if target is aten.add.Tensor:
            return _Moment("variance", centred, eps)
        case [_Moment("variance") as moment] if target is aten.rsqrt.default:
            return replace(moment, of="inverse")
        case [_Moment("variance") as moment, -0.5] if target is aten.pow.Tensor_Scalar:
            return replace(moment, of="inverse")
        case [_Moment("variance") as moment] if target is aten.sqrt.default:
            return replace(moment, of="deviation")
        case [State(a), _Moment("deviation", b, eps)] if target is aten.div.Tensor and a == b:
            return Normed("layer" if a else "rms", eps)
        case [Weight(name, 0.0), float(offset)] if target is aten.add.Tensor:
            return Weight(name, offset)
        case [x, y] if target in (aten.mul.Tensor, aten.add.Tensor):
            return _joined(target, x, y) or _joined(target, y, x)
    return None


def _joined(target: Any, x: Any, y: Any) -> Meaning | None:
    """Sums and products whose order does not matter."""
    product = target is aten.mul.Tensor
    match x, y:
        case State(a), _Moment("inverse", b, eps) if product and a == b:
            return Normed("layer" if a else "rms", eps)
        case Normed(weight=None, bias=""), Weight() if product:
            return replace(x, weight=y)
        case Normed(bias=""), Weight(name, 0.0) if not product:
            return replace(x, bias=name)
    return None


def _whole_norm(target: Any, given: list[Any]) -> Meaning | None:
    state, _, *rest = given
    if not isinstance(state, State) or state.centred:
        return None
    weight = rest[0] if rest else None
    if target is aten.rms_norm.default:
        eps = rest[1] if len(rest) > 1 else None
        # without one it depends on the dtype it is called with
        return None if eps is None else Normed("rms", eps, weight)
    bias = rest[1].name if len(rest) > 1 and rest[1] is not None else ""
    return Normed("layer", rest[2] if len(rest) > 2 else 1e-5, weight, bias)


def _logit_step(target: Any, given: list[Any]) -> Meaning | None:
    match given:
        case [_Logits(scale, 0.0)] if target is aten.tanh.default:
            return _Logits(scale, 1.0)
        case [_Logits() as logits, float() | int() as factor] if factor:
            if target in (aten.mul.Tensor, aten.mul.Scalar):
                return _scaled(logits, float(factor))
            if target in (aten.div.Tensor, aten.div.Scalar):
                return _scaled(logits, 1.0 / factor)
    return None


def _scaled(logits: _Logits, factor: float) -> _Logits:
    # b · tanh(a · x) = cap · tanh(scale · x / cap) with cap = b, scale = a · b
    return _Logits(logits.scale * factor, logits.cap * factor)
