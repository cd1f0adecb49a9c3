"""Take the writes out of a segment: new keys and values are results, written by the caller.

    before   keys.index_copy_(2, slots, k); values.index_copy_(2, slots, v)
             o = scaled_dot_product_attention(q, repeat(keys), repeat(values), mask)
             return hidden
    after    o = attend(q, keys, values, k, v, mask, slots)
             return hidden, k, v

So no branch writes or copies the cache. Where attention is computed by other operators the cache is
copied: ``index_copy(keys, 2, slots, k)`` replaces the write in place. Segments that write recurrent
states are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from eepass.errors import PassError
from eepass.ops.registry import REFERENCES
from eepass.passes.graph_walk import mutated_arguments, replace_node
from eepass.segments import Input, Segment, SplitDecoder

aten = torch.ops.aten
ROWS_DIM = 2
REPEATED = [aten.unsqueeze.default, aten.expand.default, aten.reshape.default]


def return_kv_rows(split: SplitDecoder) -> SplitDecoder:
    """``split`` with layers and KV fills that write nothing and return their rows, in the order of
    ``row_inputs``; ``PassError`` where they write anything but keys and values."""
    layers, fills = (tuple(map(rows_returned, part)) for part in (split.layers, split.kv_fills))
    return replace(split, layers=layers, kv_fills=fills)


def rows_returned(segment: Segment) -> Segment:
    """One segment; a KV fill returns only its rows."""
    graph = Graph()
    result = graph.graph_copy(segment.graph.graph, {})
    role = dict(zip(graph.find_nodes(op="placeholder"), segment.inputs, strict=True))
    copies: dict[Node, Node] = {}
    rows: dict[Input, Node] = {}
    for node in list(graph.nodes):
        for target in mutated_arguments(node):
            written = role.get(_memory_of(target))
            if written is None:
                # an intermediate of the segment
                continue
            cache = role.get(target)
            if cache is None or node.target is not aten.index_copy_.default:
                raise PassError(f"{written.name} is overwritten in place by {node.target}")
            rows[cache] = node.args[3]
            copies[_copy_instead(graph, node)] = target
    attention = aten.scaled_dot_product_attention.default
    for node in graph.find_nodes(op="call_function", target=attention):
        _read_in_place(graph, node, copies)
    outputs = result if isinstance(result, (tuple, list)) else (result,)
    # a fill's results are its writes
    hidden = [node for node in outputs if node.target is not aten.index_copy_.default]
    graph.output((*hidden, *(rows[role] for role in row_inputs(segment) if role in rows)))
    graph.eliminate_dead_code()
    module = GraphModule(torch.nn.Module(), graph)
    return Segment(module, segment.inputs, segment.structure + ".rows")


def with_standard_operators(segment: Segment) -> Segment:
    """``segment`` with the reference implementations of ``eepass::`` operators in their place."""
    graph = Graph()
    graph.output(graph.graph_copy(segment.graph.graph, {}))
    for node in graph.nodes:
        if node.target in REFERENCES:
            node.target = REFERENCES[node.target]
    module = GraphModule(torch.nn.Module(), graph)
    return Segment(module, segment.inputs, segment.structure + ".standard")


def row_inputs(segment: Segment) -> list[Input]:
    """The caches whose rows a segment returns after its other results: keys, then values."""
    caches = [role for role in segment.inputs if role.kind in ("keys", "values")]
    return sorted(caches, key=lambda role: (role.layer, role.kind))


def attend(
    q: Tensor, keys: Tensor, values: Tensor, k: Tensor, v: Tensor, mask: Tensor, slots: Tensor,
    scale: float,
) -> Tensor:  # fmt: skip
    """Grouped attention of R rows over a cache they are not in yet, and over themselves.

    q [1, Q, R, D], keys [1, G, C, D], values [1, G, C, E]; k [1, G, R, D] and v [1, G, R, E] of the
    rows, which belong in ``slots`` [R]; additive mask [1, 1, R, C] -> [1, Q, R, E].
    """
    groups, length, rows = keys.shape[1], keys.shape[2], q.shape[2]
    q = (q * scale).reshape(groups, -1, q.shape[3])  # [G, Q/G · R, D]
    own = (torch.arange(length, device=slots.device)[:, None] == slots).any(-1)
    # the rows' own slots hold nothing yet
    before = mask[0, 0].masked_fill(own, torch.finfo(mask.dtype).min)
    among = mask[0, 0].index_select(1, slots)
    past = (q @ keys[0].transpose(1, 2)).unflatten(1, (-1, rows)) + before  # [G, Q/G, R, C]
    fresh = (q @ k[0].transpose(1, 2)).unflatten(1, (-1, rows)) + among
    share = torch.cat([past, fresh], -1).softmax(-1).flatten(1, 2)
    out = share[..., :length] @ values[0] + share[..., length:] @ v[0]
    return out.reshape(1, -1, rows, values.shape[3])


def _memory_of(node: Node) -> Node:
    """The node whose memory ``node`` is, or is a view of."""
    while node.args and isinstance(source := node.args[0], Node):
        schema = getattr(node.target, "_schema", None)
        if schema is None or not schema.returns or schema.returns[0].alias_info is None:
            break
        node = source
    return node


def _copy_instead(graph: Graph, write: Node) -> Node:
    """Replace ``write`` by a copy of the cache with the rows in it, for all later readers."""
    args: tuple[Any, ...] = write.args
    with graph.inserting_before(write):
        copy = graph.call_function(aten.index_copy.default, args)
    copy.meta = dict(write.meta)
    replace_node(write, copy)
    later = {node for node in graph.nodes if node > copy}
    args[0].replace_all_uses_with(copy, delete_user_cb=lambda user: user in later)
    return copy


def _read_in_place(graph: Graph, node: Node, copies: Mapping[Node, Node]) -> None:
    args: tuple[Any, ...] = node.args
    if len(args) < 4 or args[3] is None or any(args[4:]):
        return
    q, mask = args[0], args[3]
    key, value = (_before_repeat(arg) for arg in args[1:3])
    if key not in copies or value not in copies:
        return
    query, bias = q.meta["val"], mask.meta["val"]
    if bias.dtype != query.dtype or bias.shape[:3] != (1, 1, query.shape[2]):
        return
    if key.args[1] != ROWS_DIM or value.args[1] != ROWS_DIM:
        return
    scale = node.kwargs.get("scale") or query.shape[-1] ** -0.5
    slots = key.args[2]
    with graph.inserting_before(node):
        new = graph.call_function(
            attend, (q, copies[key], copies[value], key.args[3], value.args[3], mask, slots, scale)
        )
    new.meta = dict(node.meta)
    replace_node(node, new)


def _before_repeat(node: Node) -> Node:
    """What ``node`` [1, Q, C, D] repeats for the query heads of each group, or ``node``."""
    chain: list[Node] = []
    source = node
    while source.target in (*REPEATED, aten.clone.default):
        if source.target is not aten.clone.default:
            chain.insert(0, source)
        source = source.args[0]  # type: ignore[assignment]
    if [step.target for step in chain] == REPEATED and chain[0].args[1] == 2:
        return source
    return node
