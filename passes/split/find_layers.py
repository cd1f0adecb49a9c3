"""Find the hidden states between decoder layers from the structure of the graph alone.

    ids -> embedding -> (residual: attention, KV write 0) -> (residual: MLP) -> ... -> logits
      hidden state 0 ^                                hidden state 1 ^

A hidden state is a value everything after it depends on: a node on the dominator chain from the
token ids to the logits. Layer i starts at the deepest such node that also dominates its KV writes;
the last layer ends at the last residual addition (and the tail the other layers have after theirs).
No module or parameter name is read.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import networkx as nx
import torch
from torch.fx import Node

from eepass.errors import PassError
from eepass.passes.graph_walk import MEMORY, descendants, kv_writes, mutated_arguments
from eepass.passes.report import PassReport
from eepass.segments import DecoderGraph

aten = torch.ops.aten


def find_layers(decoder: DecoderGraph, report: PassReport) -> DecoderGraph:
    """``decoder`` with its hidden states 0..L: the input of the first layer, …, the output of the
    last. Raises ``PassError`` with the reason when the graph is not a stack of layers."""
    writes = kv_writes(decoder)
    if not writes:
        raise PassError(
            "no layer writes keys and values to a cache: not a decoder with attention, "
            "or its cache was not initialised before tracing"
        )
    if missing := sorted({r.layer for r in decoder.inputs if r.kind in MEMORY} - set(writes)):
        raise PassError(f"the cache of layers {missing} is read but never written")

    dominator, chain = _dominator_chain(decoder)
    on_chain = {node: place for place, node in enumerate(chain)}
    hidden_states = []
    for layer in sorted(writes):
        node = writes[layer][0]
        while node not in on_chain:
            if node not in dominator or dominator[node] is node:
                raise PassError(f"the KV write of layer {layer} does not depend on the token ids")
            node = dominator[node]
        hidden_states.append(node)
    for layer, (first, second) in enumerate(pairwise(hidden_states)):
        if on_chain[first] >= on_chain[second]:
            raise PassError(f"layers {layer} and {layer + 1} do not follow one another")

    hidden_states.append(_last_hidden_state(chain, hidden_states))
    shapes = {tuple(node.meta["val"].shape) for node in hidden_states}
    if len(shapes) != 1:
        raise PassError(f"the hidden states between layers differ in shape: {sorted(shapes)}")
    count = report.rewritten = len(writes)
    found_by = f"{count} layers from {count} KV writes on a dominator chain of {len(chain)}"
    report.note(found_by)
    return replace(decoder, hidden_states=tuple(hidden_states), layers_found_by=found_by)


def _dominator_chain(decoder: DecoderGraph) -> tuple[dict[Node, Node], list[Node]]:
    """The immediate dominator of each node, and the nodes on every path to the logits."""
    source = next(node for node, role in decoder.roles.items() if role.kind == "ids")
    flow = nx.DiGraph()
    flow.add_node(source)
    memory = {node for node, r in decoder.roles.items() if r.kind in MEMORY}
    last_write: dict[Node, Node] = {}
    reached = {source}
    for node in decoder.graph.graph.nodes:
        inputs = [arg for arg in node.all_input_nodes if arg in reached]
        # a read of a cache placeholder after a write to it depends on the write
        inputs += [last_write[arg] for arg in node.all_input_nodes if arg in last_write]
        if inputs and node is not source:
            reached.add(node)
            flow.add_edges_from((arg, node) for arg in inputs)
            last_write |= {arg: node for arg in mutated_arguments(node) if arg in memory}
    (output,) = decoder.outputs
    if output not in reached:
        raise PassError("the logits do not depend on the token ids")
    dominator = nx.immediate_dominators(flow, source)
    dominator[source] = source
    chain = [output]
    while chain[-1] is not source:
        chain.append(dominator[chain[-1]])
    return dominator, chain[::-1]


def _last_hidden_state(chain: list[Node], hidden_states: list[Node]) -> Node:
    """The output of the last layer; ``hidden_states`` are the inputs of all."""
    from_ids = descendants(chain[0].graph, chain[:1])
    additions = [
        place
        for place, node in enumerate(chain)
        if node.target is aten.add.Tensor
        and sum(arg in from_ids for arg in node.all_input_nodes) >= 2
    ]
    start, place = chain.index(hidden_states[-1]), max(additions, default=-1)
    if place <= start:
        raise PassError("no residual addition closes the last layer")
    if len(hidden_states) < 2:
        return chain[place]
    # what follows the last addition in the layer before is the tail of this one as well
    before = [place for place in additions if place <= start]
    tail = [node.target for node in chain[before[-1] + 1 : start + 1]] if before else []
    if [node.target for node in chain[place + 1 : place + 1 + len(tail)]] != tail:
        raise PassError("the last layer does not end as the layers before it do")
    return chain[place + len(tail)]
