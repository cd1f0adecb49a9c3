"""Let attention over a static cache read keys and values in place, and the allowed slots only.

    before   k = reshape(expand(unsqueeze(keys)))       one copy of the cache per query group
             o = scaled_dot_product_attention(q, k, v, mask)
    after    o = eepass.attend_rows(q, keys, values, mask, scale)

    before   o = scaled_dot_product_attention(q, k, v, eepass.spans_mask(spans, ...))
    after    o = eepass.attend_spans(q, keys, values, spans, scale)

    before   o = scaled_dot_product_attention(q, k, v, eepass.prefix_mask(prefix, ...))
    after    o = eepass.attend_prefix(q, keys, values, prefix, scale)

    before   o = scaled_dot_product_attention(q, k, v, eepass.allow_selected(mask, slots))
    after    o = eepass.attend_selected(q, keys, values, mask, slots, scale)

Left alone: attention with dropout, without an explicit mask, over several sequences, or with more
rows or channels than the kernel was measured to be faster for. ``attend_prefix`` is torch's own
attention over part of the cache, for any number of either.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

import eepass.ops.rows  # noqa: F401  operators must be defined before they are looked for
from eepass.codegen.lower_linear import replace

aten, ours = torch.ops.aten, torch.ops.eepass
MOST_ROWS = 64
DTYPES = (torch.float32, torch.bfloat16)
# what stands for a mask -> attention that takes it in its place
BY_SPAN = {
    ours.spans_mask.default: ours.attend_spans.default,
    ours.prefix_mask.default: ours.attend_prefix.default,
}
VIEWS = {aten.reshape.default, aten.expand.default, aten.unsqueeze.default, aten.clone.default}


def lower_attention(
    gm: GraphModule, dtypes: tuple[torch.dtype, ...] = DTYPES, widest: int | None = None
) -> int:
    """Rewrite the attention calls of ``gm`` in place, those of ``dtypes`` and with up to ``widest``
    channels; returns how many."""
    rewritten = 0
    for node in gm.graph.find_nodes(
        op="call_function", target=aten.scaled_dot_product_attention.default
    ):
        if _refusal(node, dtypes, widest):
            continue
        args: tuple[Any, ...] = node.args
        q, k, v, mask = args[:4]
        scale = node.kwargs.get("scale") or q.meta["val"].shape[-1] ** -0.5
        with gm.graph.inserting_before(node):
            call = gm.graph.call_function
            flat = [
                call(aten.squeeze.dim, (tensor, 0))
                for tensor in (q, _before_repeat(k), _before_repeat(v))
            ]
            if mask.target in BY_SPAN:
                out = call(BY_SPAN[mask.target], (*flat, mask.args[0], scale))
            else:
                operator, slots = ours.attend_rows.default, []
                if mask.target is ours.allow_selected.default:
                    operator, (mask, *slots) = ours.attend_selected.default, mask.args
                rows = call(aten.select.int, (call(aten.select.int, (mask, 0, 0)), 0, 0))
                out = call(operator, (*flat, rows, *slots, scale))
            new = call(aten.unsqueeze.default, (out, 0))
        replace(node, new)
        if mask.target in BY_SPAN and not mask.users:
            gm.graph.erase_node(mask)
        rewritten += 1
    return rewritten


def take_spans(gm: GraphModule, examples: Sequence[Tensor]) -> int:
    """Let ``gm`` take spans int64 [R, 3], or a prefix int64 [3], in place of the masks
    [1, 1, R, C] for which ``examples`` holds such; returns how many."""
    taken = 0
    placeholders = gm.graph.find_nodes(op="placeholder")
    for node, example in zip(placeholders, examples, strict=True):
        value = node.meta["val"]
        if value.ndim != 4 or value.shape == example.shape:
            continue
        operator, form = ours.spans_mask.default, [value.shape[-1], value.dtype]
        if example.ndim == 1:
            operator = ours.prefix_mask.default
            form = [*value.shape[-2:], value.dtype, value.device]
        with gm.graph.inserting_after(placeholders[-1]):
            mask = gm.graph.call_function(operator, (node, *form))
        mask.meta = dict(node.meta)
        node.replace_all_uses_with(mask, lambda user, mask=mask: user is not mask)
        node.meta = {**node.meta, "val": example}
        taken += 1
    return taken


def _refusal(node: Node, dtypes: tuple[torch.dtype, ...], widest: int | None) -> str | None:
    args: tuple[Any, ...] = node.args
    if len(args) < 4 or args[3] is None or any(args[4:]):
        return "no explicit mask, or dropout"
    q, k, v, mask = (arg.meta["val"] for arg in args[:4])
    by_prefix = args[3].target is ours.prefix_mask.default
    if q.shape[0] != 1 or mask.shape[:2] != (1, 1) or (q.shape[2] > MOST_ROWS and not by_prefix):
        return "several sequences, a mask per head, or many rows"
    if q.dtype not in dtypes or mask.dtype != q.dtype:
        return f"dtype {q.dtype} with a mask of {mask.dtype}"
    if k.dtype != q.dtype or v.dtype != q.dtype:
        return "a cache of another dtype"
    if widest is not None and max(q.shape[-1], v.shape[-1]) > widest:
        return f"more than {widest} channels"
    return None


def _before_repeat(node: Node) -> Node:
    """The [1, G, C, D] tensor that ``node`` [1, Q, C, D] repeats per query group, or ``node``."""
    source, repeats = node, False
    while source.target in VIEWS and isinstance(source.args[0], Node):
        repeats |= source.target is aten.expand.default
        source = source.args[0]
    shape, wanted = source.meta["val"].shape, node.meta["val"].shape
    grouped = (
        repeats
        and len(shape) == 4
        and shape[0] == 1
        and shape[2:] == wanted[2:]
        and wanted[1] % shape[1] == 0
    )
    return source if grouped else node
