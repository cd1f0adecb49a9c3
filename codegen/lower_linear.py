"""Give linear layers over few rows the form that reads each weight once, at memory speed.

    before   q, k, v = linear(x, wq), linear(x, wk), linear(x, wv)          x [..., R, I], R <= 64
    after    q, k, v = eepass.linear_rows(x, [wq, wk, wv], [...])

    before   q, k = eepass.packed_linear(x, wq, ...), eepass.packed_linear(x, wk, ...)
    after    q, k = eepass.packed_rows(x, [wq, wk], [forms], [outputs], [biases], activations)

Layers of one kind that read the same value become one call. With more rows than that, plain weights
stay matrix products; packed ones are multiplied by one kernel whatever the number of rows.
Prepacking would tie compiled code to one layer's weights; this form takes them as inputs, so all
layers share it.
"""

import operator
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

import eepass.ops.packed
import eepass.ops.rows  # noqa: F401  the operators must be defined before they are looked for

aten, ours = torch.ops.aten, torch.ops.eepass
MOST_ROWS = 64
PACKED = ours.packed_linear.default
# a linear layer's operator -> how many arguments of its own follow x, the same over rows, with
# float32 sums
KINDS: dict[Any, tuple[int, Any, Any]] = {
    aten.linear.default: (2, ours.linear_rows.default, ours.logits_rows.default),
    PACKED: (4, ours.packed_rows.default, ours.packed_logits.default),
}


def few_rows(linear: Node) -> bool:
    """Whether the CPU's kernels are for as few rows as ``linear`` has."""
    return linear.target is PACKED or row_count(_arguments(linear)[0]) <= MOST_ROWS


def lower_linear(gm: GraphModule, fits: Callable[[Node], bool] = few_rows) -> int:
    """Rewrite the linear layers of ``gm`` that fit in place; returns how many."""
    together: dict[tuple[Any, ...], list[Node]] = {}
    for linear in filter(fits, _linears(gm)):
        x, own, options = _arguments(linear)
        tensors = [t for t in own if isinstance(t, Node)]
        # weights that are inputs exist from the start, so that the layers can move together
        if all(t.op == "placeholder" for t in tensors):
            together.setdefault((linear.target, x, *options), []).append(linear)
    for linears in together.values():
        _make_one_call(gm, linears)
    return sum(map(len, together.values()))


def lower_logits(gm: GraphModule, kinds: Collection[Any] = tuple(KINDS)) -> int:
    """Keep the sums of the linear layers of a head in float32: ``eepass.logits_rows``, or
    ``packed_logits``; of those of ``kinds``."""
    linears = [linear for linear in _linears(gm) if linear.target in kinds]
    for linear in linears:
        x, own, options = _arguments(linear)
        with gm.graph.inserting_before(linear):
            call = gm.graph.call_function
            logits = call(KINDS[linear.target][2], (as_rows(gm, x), *own, *options))
            new = call(aten.reshape.default, (logits, list(linear.meta["val"].shape)))
        replace(linear, new)
    return len(linears)


def row_count(x: Node) -> int:
    value = x.meta["val"]
    return int(value.numel() // value.shape[-1])


def as_rows(gm: GraphModule, x: Node) -> Node:
    """``x`` [..., I] reshaped to [R, I], at the graph's insertion point."""
    shape = [row_count(x), x.meta["val"].shape[-1]]
    return gm.graph.call_function(aten.reshape.default, (x, shape))


def replace(node: Node, new: Node) -> None:
    """Put ``new`` in the place of ``node``."""
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)


def _linears(gm: GraphModule) -> list[Node]:
    return [n for t in KINDS for n in gm.graph.find_nodes(op="call_function", target=t)]


def _arguments(linear: Node) -> tuple[Node, list[Any], tuple[Any, ...]]:
    """A layer's input, what is its own (None for a bias it has not), and how it is computed."""
    arguments: tuple[Any, ...] = linear.args
    end = 1 + KINDS[linear.target][0]
    own = [*arguments[1:end], *[None] * (end - len(arguments))]
    return arguments[0], own, arguments[end:]


def _make_one_call(gm: GraphModule, linears: list[Node]) -> None:
    """One call in the place of ``linears``, which are of one kind and read the same value."""
    call = gm.graph.call_function
    x, _, options = _arguments(linears[0])
    own = [list(part) for part in zip(*(_arguments(n)[1] for n in linears), strict=True)]
    value: Tensor = x.meta["val"]
    with gm.graph.inserting_before(linears[0]):
        products = call(KINDS[linears[0].target][1], (as_rows(gm, x), *own, *options))
        made = []
        for index, linear in enumerate(linears):
            product = call(operator.getitem, (products, index))
            shape = [*value.shape[:-1], linear.meta["val"].shape[-1]]
            made.append(call(aten.reshape.default, (product, shape)))
    for linear, new in zip(linears, made, strict=True):
        replace(linear, new)
