"""Give quantised linear layers over few rows the form whose kernels read each code once.

    before   q, k = quantized_linear(x, *wq, False), quantized_linear(x, *wk, False)
    after    q, k = eepass.quantized_rows(x, [codes ...], [scales ...], [mins ...], [biases ...])

As ``lower_linear``; with more rows the weights' values are made and multiplied as a matrix.
"""

from typing import Any

import torch
from torch.fx import GraphModule, Node

from eepass.codegen.lower_linear import MOST_ROWS, make_together, row_count

aten = torch.ops.aten
LINEAR = torch.ops.eepass.quantized_linear.default


def lower_quantized(gm: GraphModule) -> int:
    """Rewrite the quantised linear layers of ``gm`` in place; returns how many."""
    together: dict[tuple[Node, bool], list[Node]] = {}
    for node in gm.graph.find_nodes(op="call_function", target=LINEAR):
        x: Any = node.args[0]
        weights: tuple[Any, ...] = node.args[1:5]
        if row_count(x) <= MOST_ROWS and all(w is None or w.op == "placeholder" for w in weights):
            together.setdefault((x, bool(node.args[5])), []).append(node)
    for (x, dynamic), linears in together.items():
        _rewrite(gm, x, linears, dynamic)
    return sum(len(linears) for linears in together.values())


def lower_quantized_logits(gm: GraphModule) -> int:
    """Keep the sums of a quantised head in float32: ``eepass.quantized_logits``."""
    linears = gm.graph.find_nodes(op="call_function", target=LINEAR)
    for node in linears:
        x: Any = node.args[0]
        with gm.graph.inserting_before(node):
            call = gm.graph.call_function
            flat = call(aten.reshape.default, (x, [row_count(x), x.meta["val"].shape[-1]]))
            logits = call(torch.ops.eepass.quantized_logits.default, (flat, *node.args[1:]))
            new = call(aten.reshape.default, (logits, list(node.meta["val"].shape)))
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        gm.graph.erase_node(node)
    return len(linears)


def _rewrite(gm: GraphModule, x: Node, linears: list[Node], dynamic: bool) -> None:
    parts = [list(part) for part in zip(*(linear.args[1:5] for linear in linears), strict=True)]
    make_together(gm, x, linears, torch.ops.eepass.quantized_rows.default, (*parts, dynamic))
