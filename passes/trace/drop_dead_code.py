"""Drop what nothing reads, save what writes to its arguments."""

from __future__ import annotations

from typing import TypeVar

from torch.fx import Node

from eepass.passes.report import PassReport
from eepass.segments import Segment

S = TypeVar("S", bound=Segment)


def drop_dead_code(segment: S, report: PassReport) -> S:
    graph = segment.graph.graph
    before = len(graph.nodes)
    graph.eliminate_dead_code(is_impure_node=_has_effect)
    report.rewritten = before - len(graph.nodes)
    return segment


def _has_effect(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return node.op in ("placeholder", "output") or bool(schema and schema.is_mutable)
