"""Graphs as data: the segments of a split decoder to JSON and back.

A graph that is read back is a real ``torch.fx.GraphModule`` with shapes on its nodes: it runs, it
prints, it can be drawn and joined to an exit graph like the one it was made from. It may call
operators of ``aten`` and ``eepass``, nothing else.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from eepass.plan import ExitSegments
from eepass.segments import Head, Input, InputKind, Segment, SplitDecoder

NAMESPACES = ("aten", "prims", "eepass")
CONSTANTS: dict[str, type] = {
    "dtype": torch.dtype,
    "layout": torch.layout,
    "memory_format": torch.memory_format,
}


class NotStorable(ValueError):
    """A graph that holds more than operators and plain values; the message says what."""


class GraphWriter:
    """Turns segments into JSON; ``graphs`` holds each distinct graph once, by structure."""

    def __init__(self) -> None:
        self.graphs: dict[str, Any] = {}

    def split(self, split: SplitDecoder) -> dict[str, Any]:
        head = split.head
        return {
            "rows": split.rows,
            "cache_length": split.cache_length,
            "embed": self.segment(split.embed),
            "embed_outputs": split.embed_outputs,
            "positional": self.segment(split.positional),
            "side_outputs": split.side_outputs,
            "layers": [self.segment(segment) for segment in split.layers],
            "kv_fills": [self.segment(segment) for segment in split.kv_fills],
            "head": {
                "whole": self.segment(head.whole),
                "norm": head.norm and self.segment(head.norm),
                "weight": head.weight,
                "bias": head.bias,
                "scales": head.scales,
                "mins": head.mins,
                "dynamic": head.dynamic,
                "transform": head.transform and self.segment(head.transform),
                "reason": head.reason,
            },
            "windows": dict(split.windows),
            "how": split.layers_found_by,
            "counts_slots": split.counts_slots,
            "positions": split.positions,
        }

    def exits(self, segments: ExitSegments) -> dict[str, Any]:
        return {
            "predictors": {str(n): self.segment(p) for n, p in segments.predictors.items()},
            "verify": self.segment(segments.verify),
            "draft": self.segment(segments.draft),
            "normed": self.segment(segments.normed),
        }

    def segment(self, segment: Segment) -> dict[str, Any]:
        if segment.structure not in self.graphs:
            self.graphs[segment.structure] = _graph_to_json(segment.graph.graph)
        inputs = [[role.kind, role.name, role.layer] for role in segment.inputs]
        return {"structure": segment.structure, "inputs": inputs}


class GraphReader:
    """Turns what ``GraphWriter`` wrote back into segments; equal structures share one graph."""

    def __init__(self, graphs: Mapping[str, Any]) -> None:
        self.graphs = graphs
        self._read: dict[str, GraphModule] = {}

    def split(self, stored: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> SplitDecoder:
        head = stored["head"]
        return SplitDecoder(
            rows=stored["rows"],
            cache_length=stored["cache_length"],
            tensors=tensors,
            embed=self.segment(stored["embed"]),
            embed_outputs=tuple(stored["embed_outputs"]),
            positional=self.segment(stored["positional"]),
            side_outputs=tuple(stored["side_outputs"]),
            layers=tuple(self.segment(segment) for segment in stored["layers"]),
            kv_fills=tuple(self.segment(segment) for segment in stored["kv_fills"]),
            head=Head(
                self.segment(head["whole"]),
                head["norm"] and self.segment(head["norm"]),
                head["weight"],
                head["bias"],
                head["transform"] and self.segment(head["transform"]),
                head["reason"],
                head["scales"],
                head["mins"],
                head["dynamic"],
            ),
            windows=stored["windows"],
            layers_found_by=stored["how"],
            counts_slots=stored["counts_slots"],
            positions=stored["positions"],
        )

    def exits(self, stored: Mapping[str, Any]) -> ExitSegments:
        return ExitSegments(
            predictors={int(n): self.segment(p) for n, p in stored["predictors"].items()},
            verify=self.segment(stored["verify"]),
            draft=self.segment(stored["draft"]),
            normed=self.segment(stored["normed"]),
        )

    def segment(self, stored: Mapping[str, Any]) -> Segment:
        structure = stored["structure"]
        if structure not in self._read:
            self._read[structure] = self._graph(self.graphs[structure])
        inputs = tuple(Input(cast(InputKind, k), n, layer) for k, n, layer in stored["inputs"])
        return Segment(self._read[structure], inputs, structure)

    def _graph(self, stored: list[dict[str, Any]]) -> GraphModule:
        graph = Graph()
        nodes: list[Node] = []
        for entry in stored:
            args = tuple(_value(arg, nodes) for arg in entry["args"])
            kwargs = {name: _value(arg, nodes) for name, arg in entry["kwargs"].items()}
            if entry["op"] == "placeholder":
                node = graph.placeholder(_identifier(entry["name"]))
            elif entry["op"] == "output":
                node = graph.output(args[0])
            else:
                node = graph.call_function(_operator(entry["target"]), args, kwargs)
            if entry["val"] is not None:
                node.meta["val"] = _tensor(entry["val"])
            nodes.append(node)
        return GraphModule(torch.nn.Module(), graph)


def _tensor(stored: Any) -> Any:
    if isinstance(stored, list):
        return [_tensor(one) for one in stored]
    # of no device: a fake tensor would import all of Dynamo
    dtype = _named(torch.dtype, stored["dtype"])
    return torch.empty_strided(stored["size"], stored["stride"], dtype=dtype, device="meta")


def _graph_to_json(graph: Graph) -> list[dict[str, Any]]:
    places = {node: index for index, node in enumerate(graph.nodes)}
    entries = []
    for node in graph.nodes:
        entry: dict[str, Any] = {"op": node.op, "args": [], "kwargs": {}, "val": None}
        if node.op == "placeholder":
            entry["name"] = str(node.target)
        else:
            entry["args"] = [_argument(arg, places) for arg in node.args]
            entry["kwargs"] = {name: _argument(arg, places) for name, arg in node.kwargs.items()}
        if node.op == "call_function":
            entry["target"] = _target_name(node.target)
        elif node.op not in ("placeholder", "output"):
            raise NotStorable(f"its graph holds {node.op} {node.target}")
        if node.op != "output":
            entry["val"] = _shape(node.meta.get("val"))
        entries.append(entry)
    return entries


def _target_name(target: Any) -> str:
    if target is operator.getitem:
        return "getitem"
    if isinstance(target, torch._ops.OpOverload) and target.namespace in NAMESPACES:
        return str(target)
    raise NotStorable(f"it calls {target}, which lives in Python code that would not be there")


def _operator(name: str) -> Any:
    if name == "getitem":
        return operator.getitem
    namespace, packet, overload = name.split(".")
    if namespace not in NAMESPACES:
        raise NotStorable(f"it calls {name}, which is no operator of {', '.join(NAMESPACES)}")
    return getattr(getattr(getattr(torch.ops, namespace), packet), overload)


def _identifier(name: str) -> str:
    # names become code when the graph does
    if not name.isidentifier():
        raise NotStorable(f"{name!r} is not a name")
    return name


def _argument(value: Any, places: Mapping[Node, int]) -> Any:
    if isinstance(value, Node):
        return {"node": places[value]}
    if isinstance(value, (list, tuple)):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_argument(one, places) for one in value]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    for label, constant in CONSTANTS.items():
        if isinstance(value, constant):
            return {"torch": label, "name": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    raise NotStorable(f"its graph holds a {type(value).__name__}")


def _value(stored: Any, nodes: list[Node]) -> Any:
    if not isinstance(stored, dict):
        return stored
    if "node" in stored:
        return nodes[stored["node"]]
    if "device" in stored:
        return torch.device(stored["device"])
    if "torch" in stored:
        return _named(CONSTANTS[stored["torch"]], stored["name"])
    if "tuple" in stored:
        return tuple(_value(one, nodes) for one in stored["tuple"])
    return [_value(one, nodes) for one in stored["list"]]


def _named(kind: type, name: str) -> Any:
    value = getattr(torch, name, None)
    if not isinstance(value, kind):
        raise NotStorable(f"torch.{name} is no {kind.__name__}")
    return value


def _shape(value: Any) -> Any:
    if isinstance(value, Tensor):
        size, stride = list(value.shape), list(value.stride())
        return {"dtype": str(value.dtype).removeprefix("torch."), "size": size, "stride": stride}
    if isinstance(value, (list, tuple)):
        return [_shape(one) for one in value]
    return None
