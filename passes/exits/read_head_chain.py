"""Read the way from the last hidden state to the logits out of the graph, as data.

    before   graphs of ``Head.norm`` and ``Head.transform``
    after    HeadChain(norm="rms", eps=1e-6, weight_offset=1.0, logit_cap=30.0, ...)

The graph is evaluated symbolically: each node has a value such as "the mean of the squares" or
"normed, with this weight". No node is matched by its place in a pattern, so the order of factors
and conversions between dtypes do not matter. A node that has no value in a norm, a scale or a soft
cap is refused by name.
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
class Hidden:
    """The hidden state, or the hidden state less its mean."""

    centred: bool = False


@dataclass(frozen=True)
class _Moment:
    """What is computed from the hidden state on the way to 1/deviation."""

    of: Literal["mean", "square", "mean square", "variance", "deviation", "inverse"]
    centred: bool = False
    eps: float = 0.0


@dataclass(frozen=True)
class Weight:
    """A parameter, plus ``offset``; the name "" stands for ones."""

    name: str
    offset: float = 0.0


@dataclass(frozen=True)
class Normed:
    norm: Literal["none", "rms", "layer"]
    eps: float
    weight: Weight = Weight("")
    bias: str = ""


@dataclass(frozen=True)
class _Logits:
    """cap · tanh(scale · logits / cap), or scale · logits."""

    scale: float = 1.0
    cap: float = 0.0


Value = Hidden | _Moment | Weight | Normed | _Logits
Step = Callable[[Any, list[Any]], Value | None]


def read_head_chain(head: Head) -> HeadChain:
    """``head`` as data; raises ``PassError`` with the node that does not fit."""
    if head.norm is None:
        raise PassError(head.reason or "the head could not be taken apart")
    if head.quantized:
        raise PassError("the LM head is quantised, and its kernels read plain rows")
    found = _normed(_result(head.norm, Hidden(), _norm_step))
    if found is None:
        raise PassError("what comes before the LM head is no norm")
    logits: Value = _Logits()
    if head.transform is not None:
        logits = _result(head.transform, _Logits(), _logit_step)
    assert isinstance(logits, _Logits)
    return HeadChain(
        found.norm, found.eps, found.weight.name, found.bias, found.weight.offset, head.weight,
        head.bias, logits.scale, logits.cap,
    )  # fmt: skip


def norms_within(segment: Segment) -> dict[Node, Normed]:
    """The nodes of ``segment`` that hold its hidden state normed; other nodes are passed over."""
    values = _values(segment, Hidden(), _norm_step, refuse=False)
    found = {node: _normed(value) for node, value in values.items()}
    return {node: normed for node, normed in found.items() if normed is not None}


def _normed(value: Value) -> Normed | None:
    """``value`` as a norm of the hidden state, which as it stands is norm "none"."""
    if value == Hidden(centred=False):
        return Normed("none", 0.0)
    return value if isinstance(value, Normed) else None


def _result(segment: Segment, start: Value, step: Step) -> Value:
    return _values(segment, start, step, refuse=True)[segment.outputs[0]]


def _values(segment: Segment, start: Value, step: Step, refuse: bool) -> dict[Node, Value]:
    values: dict[Node, Value] = {}
    for node, role in segment.roles.items():
        if role.kind in ("hidden", "parameter"):
            values[node] = start if role.kind == "hidden" else Weight(role.name)
    for node in segment.graph.graph.nodes:
        if node.op == "call_function":
            given = [values.get(a, a) if isinstance(a, Node) else a for a in node.args]
            value = given[0] if node.target in SAME else step(node.target, given)
            if isinstance(value, Value):
                values[node] = value
            elif refuse:
                raise PassError(f"{node.target} ({node.name}) is no step of a known head")
    return values


def _norm_step(target: Any, given: list[Any]) -> Value | None:
    if target in (aten.layer_norm.default, aten.rms_norm.default):
        return _whole_norm(target, given)
    match given:
        case [Hidden(centred), 2 | 2.0] if target is aten.pow.Tensor_Scalar:
            return _Moment("square", centred)
        case [Hidden(a), Hidden(b)] if target is aten.mul.Tensor and a == b:
            return _Moment("square", a)
        case [Hidden(False), [-1], True] if target is aten.mean.dim:
            return _Moment("mean")
        case [_Moment("square", centred), [-1], True] if target is aten.mean.dim:
            return _Moment("mean square", centred)
        case [Hidden(False), _Moment("mean")] if target is aten.sub.Tensor:
            return Hidden(centred=True)
        case [_Moment("mean square", centred), float(eps)] if target is aten.add.Tensor:
            return _Moment("variance", centred, eps)
        case [_Moment("variance") as moment] if target is aten.rsqrt.default:
            return replace(moment, of="inverse")
        case [_Moment("variance") as moment, -0.5] if target is aten.pow.Tensor_Scalar:
            return replace(moment, of="inverse")
        case [_Moment("variance") as moment] if target is aten.sqrt.default:
            return replace(moment, of="deviation")
        case [Hidden(a), _Moment("deviation", b, eps)] if target is aten.div.Tensor and a == b:
            return Normed("layer" if a else "rms", eps)
        case [Weight(name, 0.0), float(offset)] if target is aten.add.Tensor:
            return Weight(name, offset)
        case [x, y] if target in (aten.mul.Tensor, aten.add.Tensor):
            return _joined(target, x, y) or _joined(target, y, x)
    return None


def _joined(target: Any, x: Any, y: Any) -> Value | None:
    """Sums and products whose order does not matter."""
    product = target is aten.mul.Tensor
    match x, y:
        case Hidden(a), _Moment("inverse", b, eps) if product and a == b:
            return Normed("layer" if a else "rms", eps)
        case Normed(weight=Weight(""), bias=""), Weight() if product:
            return replace(x, weight=y)
        case Normed(bias=""), Weight(name, 0.0) if not product:
            return replace(x, bias=name)
    return None


def _whole_norm(target: Any, given: list[Any]) -> Value | None:
    hidden, _, *rest = given
    if not isinstance(hidden, Hidden) or hidden.centred:
        return None
    weight = rest[0] if rest and rest[0] is not None else Weight("")
    if target is aten.rms_norm.default:
        eps = rest[1] if len(rest) > 1 else None
        # without one it depends on the dtype it is called with
        return None if eps is None else Normed("rms", eps, weight)
    bias = rest[1].name if len(rest) > 1 and rest[1] is not None else ""
    return Normed("layer", rest[2] if len(rest) > 2 else 1e-5, weight, bias)


def _logit_step(target: Any, given: list[Any]) -> Value | None:
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
