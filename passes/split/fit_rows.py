"""Derive a split decoder for another row count from two traced ones.

    traced with 8 rows       view(x, [1, 8, -1, 64])
    traced with 64 rows      view(x, [1, 64, -1, 64])
    fitted for 4 rows        view(x, [1, 4, -1, 64])

Shapes are baked into a trace as integers. Where two traces agree node for node, each integer that
differs is a linear function of the row count. Tracing takes seconds; this takes milliseconds.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

from torch.fx import Node

from eepass.errors import PassError
from eepass.passes.graph_walk import propagate_shapes
from eepass.passes.report import PassReport
from eepass.passes.split.split_segments import structure_of
from eepass.segments import Head, Segment, SplitDecoder


def fit_rows(
    few: SplitDecoder, report: PassReport, *, many: SplitDecoder, rows: int
) -> SplitDecoder:
    """Raises ``PassError`` where the two traces differ in more than integers."""
    sizes = (few.rows, many.rows, rows)
    fitted: dict[str, Segment] = {}

    def fit(a: Segment, b: Segment) -> Segment:
        if a.structure not in fitted:
            fitted[a.structure] = _fit_segment(a, b, sizes)
            report.rewritten += 1
        # isomorphic segments share the graph, each with the roles of its own inputs
        return replace(fitted[a.structure], inputs=a.inputs)

    return replace(
        few,
        rows=rows,
        embed=fit(few.embed, many.embed),
        positional=fit(few.positional, many.positional),
        layers=tuple(fit(a, b) for a, b in zip(few.layers, many.layers, strict=True)),
        kv_fills=tuple(fit(a, b) for a, b in zip(few.kv_fills, many.kv_fills, strict=True)),
        head=Head(fit(few.head.whole, many.head.whole), reason=few.head.reason),
    )


def _fit_segment(few: Segment, many: Segment, sizes: tuple[int, int, int]) -> Segment:
    graph = copy.deepcopy(few.graph)
    nodes, others = list(graph.graph.nodes), list(many.graph.graph.nodes)
    mine, theirs = ([n.target for n in s if n.op == "call_function"] for s in (nodes, others))
    if mine != theirs:
        raise PassError(f"traces with {sizes[0]} and {sizes[1]} rows differ in their operators")
    for node, other in zip(nodes, others, strict=True):
        node.args = _fit(node.args, other.args, sizes)
        node.kwargs = _fit(node.kwargs, other.kwargs, sizes)
    before, after = ([tuple(v.shape) for v in part.examples.values()] for part in (few, many))
    propagate_shapes(graph, _fit(before, after, sizes))
    graph.recompile()
    return Segment(graph, few.inputs, structure_of(graph, few.inputs))


def _fit(a: Any, b: Any, sizes: tuple[int, int, int]) -> Any:
    few, many, rows = sizes
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)) and len(a) == len(b):
        return type(a)(_fit(x, y, sizes) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return {key: _fit(a[key], b[key], sizes) for key in a}
    if isinstance(a, Node) or a == b:
        return a
    if isinstance(a, int) and isinstance(b, int) and (b - a) % (many - few) == 0:
        return a + (b - a) // (many - few) * (rows - few)
    raise PassError(f"{a!r} with {few} rows and {b!r} with {many} follow no rule")
