"""Graphs as data: the segments of a split decoder to JSON and back.

A graph that is read back is a ``torch.fx.GraphModule`` with shapes on its nodes, so that everything
works on it that works on the original. It may call operators of ``aten``, ``prims`` and ``eepass``,
nothing else.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from eepass.plan import ExitSegments
from eepass.private_names import OpOverload
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

    def parts(self, of: SplitDecoder | Head | ExitSegments) -> dict[str, Any]:
        """All its fields and its head's, except the tensors."""
        return {name: self._value(getattr(of, name)) for name in _stored_fields(type(of))}

    def segment(self, segment: Segment) -> dict[str, Any]:
        if segment.structure not in self.graphs:
            self.graphs[segment.structure] = _graph_to_json(segment.graph.graph)
        inputs = [[role.kind, role.name, role.layer] for role in segment.inputs]
        return {"structure": segment.structure, "inputs": inputs}

    def _value(self, value: Any) -> Any:
        if isinstance(value, Segment):
            return self.segment(value)
        if isinstance(value, Head):
            return self.parts(value)
        if isinstance(value, tuple):
            return [self._value(one) for one in value]
        if isinstance(value, Mapping):
            return {str(key): self._value(one) for key, one in value.items()}
        if value is None or isinstance(value, (bool, int, str)):
            return value
        raise NotStorable(f"a {type(value).__name__} is among its parts")


class GraphReader:
    """Turns what ``GraphWriter`` wrote back into segments; equal structures share one graph."""

    def __init__(self, graphs: Mapping[str, Any]) -> None:
        self.graphs = graphs
        self._read: dict[str, GraphModule] = {}

    def split(self, stored: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> SplitDecoder:
        values = self._fields(SplitDecoder, stored)
        values["head"] = Head(**self._fields(Head, stored["head"]))
        return SplitDecoder(tensors=tensors, **values)

    def exits(self, stored: Mapping[str, Any]) -> ExitSegments:
        values = self._fields(ExitSegments, stored)
        values["predictors"] = {int(layer): p for layer, p in values["predictors"].items()}
        return ExitSegments(**values)

    def segment(self, stored: Mapping[str, Any]) -> Segment:
        structure = stored["structure"]
        if structure not in self._read:
            self._read[structure] = self._graph(self.graphs[structure])
        inputs = tuple(Input(cast(InputKind, k), n, layer) for k, n, layer in stored["inputs"])
        return Segment(self._read[structure], inputs, structure)

    def _fields(self, kind: type, stored: Mapping[str, Any]) -> dict[str, Any]:
        return {name: self._value(stored[name]) for name in _stored_fields(kind)}

    def _value(self, stored: Any) -> Any:
        if isinstance(stored, list):
            return tuple(self._value(one) for one in stored)
        if not isinstance(stored, dict):
            return stored
        if stored.keys() == {"structure", "inputs"}:
            return self.segment(stored)
        return {name: self._value(one) for name, one in stored.items()}

    def _graph(self, stored: list[dict[str, Any]]) -> GraphModule:
        graph = Graph()
        nodes: list[Node] = []
        for entry in stored:
            args = tuple(_value(arg, nodes) for arg in entry["args"])
            kwargs = {name: _value(arg, nodes) for name, arg in entry["kwargs"].items()}
            if entry["op"] == "placeholder":
                # the graph's names become Python code
                if not entry["name"].isidentifier():
                    raise NotStorable(f"{entry['name']!r} is not a name")
                node = graph.placeholder(entry["name"])
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
    # meta rather than fake tensors, which would import all of Dynamo
    dtype = _named(torch.dtype, stored["dtype"])
    try:
        return torch.empty_strided(stored["size"], stored["stride"], dtype=dtype, device="meta")
    except RuntimeError as error:
        raise NotStorable(f"there is no tensor of size {stored['size']}") from error


def _stored_fields(kind: Any) -> list[str]:
    """The fields of a dataclass; tensors are stored elsewhere, once for all row counts."""
    return [field.name for field in fields(kind) if field.name != "tensors"]


def _graph_to_json(graph: Graph) -> list[dict[str, Any]]:
    indices = {node: index for index, node in enumerate(graph.nodes)}
    entries = []
    for node in graph.nodes:
        entry: dict[str, Any] = {
            "op": node.op,
            "args": [_argument(arg, indices) for arg in node.args],
            "kwargs": {name: _argument(arg, indices) for name, arg in node.kwargs.items()},
            "val": None if node.op == "output" else _shape(node.meta.get("val")),
        }
        if node.op == "placeholder":
            entry["name"] = str(node.target)
        elif node.op == "call_function":
            entry["target"] = _target_name(node.target)
        elif node.op != "output":
            raise NotStorable(f"its graph holds {node.op} {node.target}")
        entries.append(entry)
    return entries


def _target_name(target: Any) -> str:
    if target is operator.getitem:
        return "getitem"
    if isinstance(target, OpOverload) and target.namespace in NAMESPACES:
        return str(target)
    raise NotStorable(f"it calls {target}, which is Python code and cannot be stored")


def _operator(name: str) -> Any:
    if name == "getitem":
        return operator.getitem
    namespace, packet, overload = name.split(".")
    if namespace not in NAMESPACES:
        raise NotStorable(f"it calls {name}, which is no operator of {', '.join(NAMESPACES)}")
    return getattr(getattr(getattr(torch.ops, namespace), packet), overload)


def _argument(value: Any, indices: Mapping[Node, int]) -> Any:
    if isinstance(value, Node):
        return {"node": indices[value]}
    if isinstance(value, (list, tuple)):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_argument(one, indices) for one in value]}
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
