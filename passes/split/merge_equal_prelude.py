"""Compute once what several layers compute alike before they read the hidden state.

    before   table_0 = cos(positions * f); table_1 = cos(positions * f)      one for each layer
    after    table_0 = cos(positions * f)                                    read by both

Left alone: whatever depends on hidden state 0, and what depends on parameters and caches alone
(each layer keeps its own, so that layers stay isomorphic).
"""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from eepass.passes.graph_walk import descendants, replace_node
from eepass.passes.report import PassReport
from eepass.segments import DecoderGraph


def merge_equal_prelude(decoder: DecoderGraph, report: PassReport) -> DecoderGraph:
    graph = decoder.graph.graph
    given = [n for n, r in decoder.roles.items() if r.kind in ("ids", "positions", "mask")]
    prelude = descendants(graph, given) - descendants(graph, decoder.hidden_states[:1])
    seen: dict[Any, Node] = {}
    for node in list(graph.nodes):
        if node in prelude and node.op == "call_function":
            key = (node.target, repr(node.args), repr(node.kwargs))
            if key in seen:
                replace_node(node, seen[key])
                report.rewritten += 1
            else:
                seen[key] = node
    return decoder
