"""Dynamo's graph of one call, seen as a function of its tensors.

    before   (s0, ids, keys [1, G, s0, D], …, s1) -> (s1 + 1, logits)
    after    (ids, keys, …) -> logits, for each value of s0; s1 + 1 beside it

Numbers that are sizes of a tensor are put in, one specialisation for each of their values. Others,
as a sliding cache's count of its tokens, differ from call to call: they may only make numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from eepass.errors import PassError
from eepass.passes.graph_walk import ancestors, copy_nodes, descendants


class CallerGraph:
    """``graph``, whose one tensor result is the logits [B, 1, V] of one token a sequence.

    Raises ``PassError`` where it is not, with the reason.
    """

    def __init__(self, graph: GraphModule, examples: Sequence[Any]) -> None:
        self.graph = graph
        looks = [n.meta["example_value"] for n in graph.graph.find_nodes(op="placeholder")]
        self._tensor_at = [i for i, value in enumerate(examples) if isinstance(value, Tensor)]
        shapes = [looks[place].shape for place in self._tensor_at]
        sizes = {symbol for shape in shapes for size in shape for symbol in _symbols(size)}
        self._sizes_at = [
            place
            for place, look in enumerate(looks)
            if place not in self._tensor_at and _symbols(look) <= sizes
        ]
        returned: Any = graph.graph.output_node().args[0]
        results = list(returned) if isinstance(returned, (tuple, list)) else [returned]
        tensors = [place for place, node in enumerate(results) if _makes_tensor(node)]
        if len(tensors) != 1:
            raise PassError(f"it returns {len(tensors)} tensors, not the logits alone")
        self._logits_at = tensors[0]
        logits = results[self._logits_at].meta["example_value"]
        if logits.ndim != 3 or logits.shape[1] != 1 or not logits.is_floating_point():
            raise PassError(f"it returns {tuple(logits.shape)}, not logits of one token a sequence")
        self._numbers = self._number_graph(results)

    def _number_graph(self, results: Sequence[Any]) -> GraphModule | None:
        """The part of the graph that makes its results but the logits; None if there are none."""
        graph = self.graph.graph
        placeholders = graph.find_nodes(op="placeholder")
        wanted = [node for place, node in enumerate(results) if place != self._logits_at]
        needed = ancestors(node for node in wanted if isinstance(node, Node))
        if any(_makes_tensor(node) and node.op != "placeholder" for node in needed):
            raise PassError("it returns numbers read from tensors")
        known_at = {*self._tensor_at, *self._sizes_at}
        counts = [node for place, node in enumerate(placeholders) if place not in known_at]
        beyond = descendants(graph, counts) - needed - {graph.output_node(), *placeholders}
        if beyond:
            first = next(node for node in graph.nodes if node in beyond)
            raise PassError(f"{first.name} depends on a number that changes with every token")
        if not wanted:
            return None
        part = Graph()
        known = {node: part.placeholder(node.name) for node in placeholders}
        copy_nodes([node for node in graph.nodes if node in needed], part, known, lambda node: node)
        # in the place of the logits stands None
        part.output(tuple(known.get(n) if isinstance(n, Node) else n for n in results))
        return GraphModule(torch.nn.Module(), part)

    def tensors_of(self, arguments: Sequence[Any]) -> list[Tensor]:
        """The tensors among a call's arguments; places elsewhere are places in this list."""
        if not self._sizes_at and len(self._tensor_at) == len(arguments):
            return list(arguments)
        return [arguments[place] for place in self._tensor_at]

    def key(self, arguments: Sequence[Any]) -> tuple[int, ...]:
        """What code must be specialised for: the sizes that differ between calls."""
        return tuple(_number(arguments[place]) for place in self._sizes_at)

    def bound(self, arguments: Sequence[Any]) -> Callable[..., Tensor]:
        """The graph with the numbers of ``arguments``, a function of tensors to logits."""
        numbers = [None if isinstance(value, Tensor) else _number(value) for value in arguments]

        def run(*tensors: Tensor) -> Tensor:
            values: list[Any] = list(numbers)
            for place, tensor in zip(self._tensor_at, tensors, strict=True):
                values[place] = tensor
            found = self.graph(*values)
            return found[self._logits_at] if isinstance(found, (tuple, list)) else found

        return run

    def results(self, arguments: Sequence[Any], logits: Tensor) -> tuple[Any, ...]:
        """What the graph returns, given its logits."""
        if self._numbers is None:
            return (logits,)
        found = list(self._numbers(*arguments))
        found[self._logits_at] = logits
        return tuple(found)


def _makes_tensor(node: Any) -> bool:
    return isinstance(node, Node) and isinstance(node.meta.get("example_value"), Tensor)


def _symbols(size: Any) -> set[Any]:
    return set(size.node.expr.free_symbols) if isinstance(size, torch.SymInt) else set()


def _number(value: Any) -> Any:
    # a hint: asking for the number itself would bind the whole graph to it
    return value.node.hint if isinstance(value, torch.SymInt) else value
