"""Questions about a traced graph that several passes ask."""

from collections.abc import Callable, Iterable, Mapping, Sequence

from torch.fx import Graph, Node
from torch.fx.node import map_arg

from eepass.segments import DecoderGraph, Input


def roles(decoder: DecoderGraph) -> dict[Node, Input]:
    """The role of every placeholder."""
    placeholders = decoder.graph.graph.find_nodes(op="placeholder")
    return dict(zip(placeholders, decoder.inputs, strict=True))


def mutated_arguments(node: Node) -> list[Node]:
    """Nodes this call writes to, by the operator's schema."""
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None or not schema.is_mutable:
        return []
    written = []
    for position, argument in enumerate(schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = (
            node.args[position]
            if position < len(node.args)
            else node.kwargs.get(argument.name, None)
        )
        if isinstance(value, Node):
            written.append(value)
    return written


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
    nodes: Sequence[Node],
    graph: Graph,
    known: dict[Node, Node],
    resolve: Callable[[Node], Node],
) -> None:
    """Copy ``nodes`` into ``graph``; an argument not in ``known`` is asked of ``resolve``."""

    def lookup(node: Node) -> Node:
        if node not in known:
            known[node] = resolve(node)
        return known[node]

    for node in nodes:
        if node not in known:
            args = map_arg(node.args, lookup)
            kwargs = map_arg(node.kwargs, lookup)
            # named anew, so that equal segments print equal code
            known[node] = graph.create_node(node.op, node.target, args, kwargs)
            known[node].meta = dict(node.meta)


# what tokens leave behind for later ones
MEMORY = ("keys", "values", "state")


def kv_writes(decoder_roles: Mapping[Node, Input], graph: Graph) -> dict[int, list[Node]]:
    """Per KV layer, the nodes that write its keys, values or state."""
    writes: dict[int, list[Node]] = {}
    for node in graph.nodes:
        for target in mutated_arguments(node):
            role = decoder_roles.get(target)
            if role is not None and role.kind in MEMORY:
                writes.setdefault(role.layer, []).append(node)
    return writes


def hoist_placeholders(graph: Graph, placeholders: Sequence[Node]) -> None:
    """Move placeholders made on demand to the top, in their order."""
    for placeholder in reversed(placeholders):
        first = next(iter(graph.nodes))
        if placeholder is not first:
            first.prepend(placeholder)
