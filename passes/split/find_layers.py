"""Find the boundaries between decoder layers from the structure of the graph alone.

    ids -> embedding -> (residual: attention, KV write 0) -> (residual: MLP) -> ... -> logits
    boundary 0 ^                                 boundary 1 ^

A boundary is a value everything after it depends on: a node on the dominator chain from the token
ids to the logits. Layer i starts at the deepest such node that also dominates its KV writes; the
last layer ends at the last residual addition (and the tail the other layers have after theirs).
No module or parameter name is read.
"""

from __future__ import annotations

from itertools import pairwise

import networkx as nx
import torch
from torch.fx import Graph, Node

from eepass.errors import PassError
from eepass.passes.graph_walk import MEMORY, descendants, kv_writes, mutated_arguments, roles
from eepass.passes.report import PassReport
from eepass.segments import DecoderGraph

aten = torch.ops.aten


def find_layers(decoder: DecoderGraph, report: PassReport) -> list[Node]:
    """Boundaries 0..L: the input of the first layer, …, the output of the last.

    Raises ``PassError`` with the reason when the graph is not a stack of layers.
    """
    graph = decoder.graph.graph
    role = roles(decoder)
    source = next(node for node, r in role.items() if r.kind == "ids")
    output = graph.output_node().all_input_nodes[0]
    writes = kv_writes(role, graph)
    state_layers = {r.layer for r in role.values() if r.kind in MEMORY}
    if not writes:
        raise PassError(
            "no layer writes keys and values to a cache: not a decoder with attention, "
            "or its cache was not initialised before tracing"
        )
    if missing := sorted(state_layers - set(writes)):
        raise PassError(f"the cache of layers {missing} is read but never written")

    dominator, chain = _dominator_chain(decoder, source, output)
    on_chain = {node: place for place, node in enumerate(chain)}
    boundaries = []
    for layer in sorted(writes):
        node = writes[layer][0]
        while node not in on_chain:
            if node not in dominator or dominator[node] is node:
                raise PassError(f"the KV write of layer {layer} does not depend on the token ids")
            node = dominator[node]
        boundaries.append(node)
    for layer, (first, second) in enumerate(pairwise(boundaries)):
        if on_chain[first] >= on_chain[second]:
            raise PassError(f"layers {layer} and {layer + 1} do not follow one another")

    boundaries.append(_last_boundary(chain, boundaries, source, graph))
    shapes = {tuple(node.meta["val"].shape) for node in boundaries}
    if len(shapes) != 1:
        raise PassError(f"boundaries differ in shape: {sorted(shapes)}")
    report.rewritten = len(writes)
    report.note(
        f"{len(writes)} layers from {len(writes)} KV writes on a dominator chain of {len(chain)}"
    )
    return boundaries


def _dominator_chain(
    decoder: DecoderGraph, source: Node, output: Node
) -> tuple[dict[Node, Node], list[Node]]:
    graph = decoder.graph.graph
    flow = nx.DiGraph()
    flow.add_node(source)
    role = roles(decoder)
    last_write: dict[Node, Node] = {}
    state = {node for node, r in role.items() if r.kind in MEMORY}
    reached = {source}
    for node in graph.nodes:
        inputs = [arg for arg in node.all_input_nodes if arg in reached]
        # a read of a cache placeholder after a write to it depends on the write
        inputs += [last_write[arg] for arg in node.all_input_nodes if arg in last_write]
        if inputs and node is not source:
            reached.add(node)
            flow.add_edges_from((arg, node) for arg in inputs)
            last_write |= {arg: node for arg in mutated_arguments(node) if arg in state}
    if output not in reached:
        raise PassError("the logits do not depend on the token ids")
    dominator = nx.immediate_dominators(flow, source)
    dominator[source] = source
    chain = [output]
    while chain[-1] is not source:
        chain.append(dominator[chain[-1]])
    return dominator, chain[::-1]


def _last_boundary(chain: list[Node], boundaries: list[Node], source: Node, graph: Graph) -> Node:
    from_ids = descendants(graph, [source])
    additions = [
        place
        for place, node in enumerate(chain)
        if node.target is aten.add.Tensor
        and sum(arg in from_ids for arg in node.all_input_nodes) >= 2
    ]
    place_of = {node: place for place, node in enumerate(chain)}
    after = [place for place in additions if place > place_of[boundaries[-1]]]
    if not after:
        raise PassError("no residual addition closes the last layer")
    if len(boundaries) < 2:
        return chain[after[-1]]
    # what follows the last addition in the layer before is the tail of this one as well
    end = place_of[boundaries[-1]]
    before = [place for place in additions if place <= end]
    tail = [node.target for node in chain[before[-1] + 1 : end + 1]] if before else []
    place = after[-1]
    if [node.target for node in chain[place + 1 : place + 1 + len(tail)]] != tail:
        raise PassError("the last layer does not end as the layers before it do")
    return chain[place + len(tail)]
