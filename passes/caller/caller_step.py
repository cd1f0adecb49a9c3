"""Take apart a decode step that somebody else traced, over a cache that is the caller's.

    before   Dynamo's graph of one call: ids [B, 1], masks, parameters, keys, values, lengths
    after    the segments of ``split_segments``, and which of the call's tensors each one reads

Nobody says which input is what. Parameters are known by identity; a cache is what the graph writes
to, its floating-point tensors in pairs of keys and values, one pair a layer; lengths are whole
numbers it adds to; the ids are whole numbers that look up an embedding. What else the caller brings
belongs to the prelude.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from eepass.errors import PassError
from eepass.passes.caller.stack_rows import check_stacked, stack_rows
from eepass.passes.graph_walk import descendants, mutated_arguments
from eepass.passes.report import PassReport
from eepass.passes.split.find_layers import find_layers
from eepass.passes.split.split_segments import build_segment, split_segments
from eepass.passes.trace.capture import drop_dead_code, trace_to_aten
from eepass.segments import CallerStep, DecoderGraph, Input, Segment, SplitDecoder

aten = torch.ops.aten


def split_caller_step(
    step: Callable[..., Tensor],
    tensors: Sequence[Tensor],
    weights: Mapping[int, str],
    row_counts: Sequence[int],
    report: PassReport,
) -> CallerStep:
    """Split ``step``, a function of ``tensors`` to logits [B, 1, V] that adds to their caches.

    ``weights`` names parameters and buffers by ``id``. Layers are also made for ``row_counts`` rows
    of one sequence, if they take them; else ``report`` says why. Raises ``PassError`` where
    ``step`` is no decode step of one token a sequence, with the reason.
    """
    try:
        traced = trace_to_aten(step, tensors)
    except (RuntimeError, NotImplementedError, TypeError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise PassError(f"its graph cannot be traced to ATen: {first}") from error
    _inline_constants(traced)
    _drop_no_conversions(traced)
    drop_dead_code(traced)
    _refuse_writes_through_views(traced)
    advance = _take_advance(traced)
    roles = _roles(traced, tensors, weights)
    _additive_masks(traced)
    places = {role: place for place, role in enumerate(roles)}
    caches = tuple(sorted((p for r, p in places.items() if r.layer >= 0), key=_pairs(roles)))
    known = {roles[p].name: tensors[p] for r, p in places.items() if r.kind == "parameter"}
    batch, _, slots, _ = tensors[caches[0]].shape
    decoder = DecoderGraph(traced, tuple(roles), 1, int(slots), known, {})
    split = split_segments(decoder, find_layers(decoder, report), report)
    split, passed = _without_passing_through(split, places)
    logits = traced.graph.output_node().all_input_nodes[0].meta["val"]
    found = CallerStep(split, places, passed, caches, advance, int(batch), logits, {})
    check_caller_step(step, tensors, found)
    try:
        return replace(found, stacked=_stacked(found, tensors, row_counts))
    except PassError as error:
        report.skip("several rows", str(error))
        return found


def check_caller_step(
    step: Callable[..., Tensor], tensors: Sequence[Tensor], found: CallerStep
) -> None:
    """Run both on copies of what they write to; raises ``PassError`` where they differ in a bit."""
    written = {*found.caches, *(place for place, _ in found.advance)}
    whole = [t.clone() if i in written else t for i, t in enumerate(tensors)]
    parts = [t.clone() if i in written else t for i, t in enumerate(tensors)]
    with torch.no_grad():
        expected = step(*whole)
        run = _Eager(found, parts)
        hidden = run.hidden
        for layer in found.split.layers:
            (hidden,) = run(layer, hidden)
        (logits,) = run(found.split.head.whole, hidden)
        for place, rows in found.advance:
            parts[place].add_(rows)
    if not _same(logits, expected):
        raise PassError("the split step gives other logits than the traced one")
    for place in sorted(written):
        if not _same(parts[place], whole[place]):
            raise PassError(f"the split step leaves another input {place} than the traced one")


class _Eager:
    """Runs segments of a step as they stand over ``tensors``; ``hidden`` is boundary 0."""

    def __init__(self, step: CallerStep, tensors: Sequence[Tensor]) -> None:
        self.places, self.tensors = step.places, tensors
        self.sides = {name: tensors[place] for name, place in step.passed.items()}
        split = step.split
        self.hidden, *token_sides = self(split.embed)
        self.sides |= dict(zip(split.embed_outputs[1:], token_sides, strict=True))
        self.sides |= dict(zip(split.side_outputs, self(split.positional), strict=True))

    def values(self, segment: Segment, hidden: Tensor | None) -> dict[Input, Tensor]:
        found: dict[Input, Any] = {}
        for role in segment.inputs:
            if role.kind == "hidden":
                found[role] = hidden
            elif role.kind == "side":
                found[role] = self.sides[role.name]
            else:
                found[role] = self.tensors[self.places[role]]
        return found

    def __call__(self, segment: Segment, hidden: Tensor | None = None) -> list[Tensor]:
        values = self.values(segment, hidden)
        result = segment.graph(*(values[role] for role in segment.inputs))
        return list(result) if isinstance(result, (tuple, list)) else [result]


def _stacked(
    step: CallerStep, tensors: Sequence[Tensor], row_counts: Sequence[int]
) -> dict[int, tuple[Segment, ...]]:
    if step.batch > 1:
        raise PassError("several sequences go together already")
    with torch.no_grad():
        run = _Eager(step, tensors)
    found = {}
    for rows in row_counts:
        made: dict[str, Segment] = {}
        for layer in step.split.layers:
            if layer.structure not in made:
                segment = stack_rows(layer, rows)
                check_stacked(layer, segment, rows, run.values(layer, run.hidden))
                made[layer.structure] = segment
        found[rows] = tuple(
            replace(made[layer.structure], inputs=layer.inputs) for layer in step.split.layers
        )
    return found


def _pairs(roles: Sequence[Input]) -> Callable[[int], tuple[int, str]]:
    # keys before values, layer by layer
    return lambda place: (roles[place].layer, roles[place].kind)


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=0.0, atol=0.0, equal_nan=True)


def _placeholders(traced: GraphModule) -> list[Node]:
    return traced.graph.find_nodes(op="placeholder")


def _take_advance(traced: GraphModule) -> tuple[tuple[int, int], ...]:
    """Strip what adds to the lengths; the step does it when all layers have read them."""
    placeholders = _placeholders(traced)
    order = {node: place for place, node in enumerate(traced.graph.nodes)}
    found = []
    for node in list(traced.graph.nodes):
        for target in mutated_arguments(node):
            if target not in placeholders or target.meta["val"].is_floating_point():
                continue
            place = placeholders.index(target)
            rows = node.args[1]
            if node.target is not aten.add_.Tensor or not isinstance(rows, int) or node.users:
                raise PassError(f"it changes its input {place} by {node.target}")
            if any(order[user] > order[node] for user in target.users):
                raise PassError(f"it reads the length at input {place} after adding to it")
            found.append((place, rows))
            traced.graph.erase_node(node)
    return tuple(found)


def _roles(
    traced: GraphModule, tensors: Sequence[Tensor], weights: Mapping[int, str]
) -> list[Input]:
    placeholders = _placeholders(traced)
    written: list[Node] = []
    for node in traced.graph.nodes:
        for target in mutated_arguments(node):
            if target in placeholders and target not in written:
                written.append(target)
    if not written or len(written) % 2:
        raise PassError("it writes no keys and values in pairs to a static cache")
    ids = _token_ids(traced, placeholders, weights, tensors)
    found = []
    for place, (node, tensor) in enumerate(zip(placeholders, tensors, strict=True)):
        if node in written:
            layer, second = divmod(written.index(node), 2)
            kind = "values" if second else "keys"
            if id(tensor) in weights:
                raise PassError(f"it writes to {weights[id(tensor)]}, which is a weight")
            if tensor.ndim != 4:
                raise PassError(f"its cache is of shape {tuple(tensor.shape)}, not [B, G, C, D]")
            found.append(Input(kind, f"{kind}.{layer}", layer))  # type: ignore[arg-type]
        elif node is ids:
            found.append(Input("ids", "ids"))
        elif id(tensor) in weights:
            found.append(Input("parameter", weights[id(tensor)]))
        elif _own_length(node):
            found.append(Input("slots", f"slots.{place}"))
        else:
            # a mask, positions, or whatever else: known before the first layer
            found.append(Input("positions", f"caller.{place}"))
    return found


def _own_length(node: Node) -> bool:
    """Whether a scalar serves to place one layer's rows, so that its arithmetic goes with it."""
    value = node.meta["val"]
    if value.ndim or value.is_floating_point():
        return False
    return all(
        user.target is aten.add.Tensor
        and all(next_.target in (aten.index_copy_.default, aten.index_put_.default)
                for next_ in user.users)
        for user in node.users
    )  # fmt: skip


def _token_ids(
    traced: GraphModule,
    placeholders: Sequence[Node],
    weights: Mapping[int, str],
    tensors: Sequence[Tensor],
) -> Node:
    """The input [B, 1] that looks up the table with a row for each logit, or else the largest."""
    logits = traced.graph.output_node().all_input_nodes[0].meta["val"]
    if logits.ndim != 3 or logits.shape[1] != 1 or not logits.is_floating_point():
        raise PassError(f"its result is {tuple(logits.shape)}, not logits of one token a sequence")
    best: tuple[int, Node] | None = None
    for node, tensor in zip(placeholders, tensors, strict=True):
        value = node.meta["val"]
        if value.is_floating_point() or value.ndim != 2 or id(tensor) in weights:
            continue
        rows = [
            _size(reader.args[0])
            for reader in descendants(traced.graph, [node])
            if reader.target is aten.embedding.default and _index_of(reader, node)
        ]
        if rows and value.shape[1] == 1:
            size = (1 << 40) if logits.shape[-1] in rows else max(rows)
            if best is None or size > best[0]:
                best = (size, node)
    if best is None:
        raise PassError("no input of one token a sequence looks up an embedding")
    return best[1]


def _size(table: Any) -> int:
    return int(table.meta["val"].shape[0])


def _index_of(embedding: Node, ids: Node) -> bool:
    index: Any = embedding.args[1]
    while index is not ids and isinstance(index, Node) and len(index.all_input_nodes) == 1:
        index = index.all_input_nodes[0]
    return index is ids


def _inline_constants(traced: GraphModule) -> None:
    """Constant tensors of one element become operators: layers that hold them stay isomorphic."""
    for node in traced.graph.find_nodes(op="get_attr"):
        value = getattr(traced, str(node.target))
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise PassError(f"it holds a constant of shape {tuple(getattr(value, 'shape', ()))}")
        with traced.graph.inserting_before(node):
            full = traced.graph.call_function(
                aten.full.default,
                (list(value.shape), value.item()),
                {"dtype": value.dtype, "device": value.device},
            )
        full.meta = dict(node.meta)
        full.meta.setdefault("val", _example(traced).fake_mode.from_tensor(value))
        node.replace_all_uses_with(full)
        traced.graph.erase_node(node)


def _drop_no_conversions(traced: GraphModule) -> None:
    """A conversion to what an input already is gives the input itself, which may be written to."""
    for node in _placeholders(traced):
        for user in list(node.users):
            name = getattr(getattr(user.target, "_schema", None), "name", "")
            if name != "aten::to" or user.args[0] is not node or user.kwargs.get("copy"):
                continue
            mine, other = node.meta["val"], user.meta["val"]
            if (mine.dtype, mine.device) == (other.dtype, other.device):
                user.replace_all_uses_with(node)
                traced.graph.erase_node(user)


def _example(traced: GraphModule) -> Any:
    return _placeholders(traced)[0].meta["val"]


def _refuse_writes_through_views(traced: GraphModule) -> None:
    """A write to part of an input would go unseen: what is written must be the input itself."""
    for node in traced.graph.nodes:
        for target in mutated_arguments(node):
            root = target
            while root.op == "call_function" and (source := _viewed(root)) is not None:
                root = source
            if root is not target and root.op == "placeholder":
                raise PassError(f"it writes to a view of its input {root.name} ({node.target})")


def _viewed(node: Node) -> Node | None:
    """What ``node`` may be a view of."""
    schema = getattr(node.target, "_schema", None)
    for argument, value in zip(schema.arguments if schema else (), node.args, strict=False):
        if argument.alias_info is not None and isinstance(value, Node):
            return value
    return None


def _additive_masks(traced: GraphModule) -> None:
    """Boolean masks of attention become additive, once for all layers: kernels want them so."""
    made: dict[tuple[Node, torch.dtype], Node] = {}
    for node in traced.graph.find_nodes(
        op="call_function", target=aten.scaled_dot_product_attention.default
    ):
        args: tuple[Any, ...] = node.args
        if len(args) < 4 or args[3] is None or args[3].meta["val"].dtype is not torch.bool:
            continue
        mask, dtype = args[3], args[0].meta["val"].dtype
        if (mask, dtype) not in made:
            device = mask.meta["val"].device
            with traced.graph.inserting_after(mask):
                forbidden = traced.graph.call_function(
                    aten.full.default,
                    ((), torch.finfo(dtype).min),
                    {"dtype": dtype, "device": device},
                )
            with traced.graph.inserting_after(forbidden):
                allowed = traced.graph.call_function(
                    aten.full.default, ((), 0.0), {"dtype": dtype, "device": device}
                )
            with traced.graph.inserting_after(allowed):
                added = traced.graph.call_function(aten.where.self, (mask, allowed, forbidden))
            value = mask.meta["val"]
            fake = value.fake_mode
            with fake:
                forbidden.meta["val"] = torch.empty((), dtype=dtype, device=device)
                allowed.meta["val"] = torch.empty((), dtype=dtype, device=device)
                added.meta["val"] = torch.empty(value.shape, dtype=dtype, device=device)
            made[mask, dtype] = added
        node.args = (*args[:3], made[mask, dtype], *args[4:])
    if made:
        first = next(n for n in traced.graph.nodes if n.op != "placeholder")
        for node in _placeholders(traced):
            first.prepend(node)
        traced.graph.lint()
        traced.recompile()


def _without_passing_through(
    split: SplitDecoder, places: Mapping[Input, int]
) -> tuple[SplitDecoder, dict[str, int]]:
    """Side inputs that are inputs of the call are read where they are."""
    graph = split.positional.graph.graph
    role = dict(zip(graph.find_nodes(op="placeholder"), split.positional.inputs, strict=True))
    outputs: Any = graph.output_node().args[0]
    outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
    passed, made = {}, {}
    for name, node in zip(split.side_outputs, outputs, strict=True):
        if node in role:
            passed[name] = places[role[node]]
        else:
            made[name] = node
    positional = build_segment([], list(made.values()), role)
    return replace(split, positional=positional, side_outputs=tuple(made)), passed
