"""What several passes ask of a traced graph, or do to it."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from eepass.private_names import FakeTensorMode
from eepass.segments import Segment

# the inputs in which a token leaves something behind for later ones
MEMORY = ("keys", "values", "state")


def mutated_arguments(node: Node) -> list[Node]:
    """Nodes this call writes to, by the operator's schema."""
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None or not schema.is_mutable:
        return []
    values = dict(zip((argument.name for argument in schema.arguments), node.args, strict=False))
    values |= node.kwargs
    written = (a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write)
    return [value for name in written if isinstance(value := values.get(name), Node)]


def descendants(graph: Graph, sources: Iterable[Node]) -> set[Node]:
    """The sources and every node computed from them."""
    found = set(sources)
    for node in graph.nodes:
        if node not in found and any(arg in found for arg in node.all_input_nodes):
            found.add(node)
    return found


def ancestors(targets: Iterable[Node]) -> set[Node]:
    """The targets and every node they are computed from."""
    found: set[Node] = set()
    stack = list(targets)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found


def copy_nodes(
    nodes: Sequence[Node], graph: Graph, known: dict[Node, Node], resolve: Callable[[Node], Node]
) -> None:
    """Copy ``nodes`` into ``graph``; ``resolve`` makes the arguments that are not in ``known``."""

    def lookup(node: Node) -> Node:
        if node not in known:
            known[node] = resolve(node)
        return known[node]

    for node in nodes:
        if node not in known:
            args = map_arg(node.args, lookup)
            kwargs = map_arg(node.kwargs, lookup)
            # with a name of its own making, so that equal segments print equal code
            known[node] = graph.create_node(node.op, node.target, args, kwargs)
            known[node].meta = dict(node.meta)


def kv_writes(segment: Segment) -> dict[int, list[Node]]:
    """Per KV layer, the nodes that write its keys, values or state."""
    role = segment.roles
    writes: dict[int, list[Node]] = {}
    for node in segment.graph.graph.nodes:
        for target in mutated_arguments(node):
            if target in role and role[target].kind in MEMORY:
                writes.setdefault(role[target].layer, []).append(node)
    return writes


def replace_node(node: Node, new: Node) -> None:
    """Put ``new`` in the place of ``node``, which goes."""
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)


def hoist_placeholders(graph: Graph, placeholders: Sequence[Node]) -> None:
    """Move placeholders that were made on demand to the top, in their order."""
    for placeholder in reversed(placeholders):
        first = next(iter(graph.nodes))
        if placeholder is not first:
            first.prepend(placeholder)


def propagate_shapes(graph: GraphModule, shapes: Sequence[Sequence[int]]) -> None:
    """Recompute the example value of every node, for placeholders of these shapes."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    values = [node.meta["val"] for node in graph.graph.find_nodes(op="placeholder")]
    with mode:
        examples = [
            torch.empty(tuple(shape), dtype=value.dtype, device=value.device)
            for value, shape in zip(values, shapes, strict=True)
        ]
    with torch.no_grad():
        FakeTensorProp(graph, mode).propagate_dont_convert_inputs(*examples)
