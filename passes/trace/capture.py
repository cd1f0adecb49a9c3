"""Trace one decode step into an ATen graph whose placeholders have known roles.

before   step(ids [1, R], positions [1, R], masks) -> logits [1, R, V], over a static KV cache
after    a GraphModule of ATen operators; every placeholder is an ``Input``: a token tensor, a
         parameter by name, or the keys, values, length (``slots``) or states of a layer's cache
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from eepass.errors import PassError
from eepass.private_names import log_api_usage_once
from eepass.segments import DecoderGraph, Input, InputKind

# of grad mode and autocast: the step runs without either
MODE_SWITCHES = ("_set_grad_enabled", "_enter_autocast", "_exit_autocast")


@dataclass(frozen=True, slots=True)
class KvSlots:
    """Static cache of one layer: keys and values [1, heads, slots, width], ``start`` a scalar.

    A recurrent layer has ``states`` instead, or besides: tensors each token overwrites in place.
    """

    keys: Tensor | None = None
    values: Tensor | None = None
    start: Tensor | None = None
    states: tuple[Tensor, ...] = ()


def capture(
    step: Callable[..., Tensor], ids: Tensor, positions: Tensor, masks: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor], cache: Sequence[KvSlots], windows: Mapping[str, int | None],
    positions_known: int | None = None,
) -> DecoderGraph:  # fmt: skip
    """Trace ``step(ids, positions, masks)``; raises ``PassError`` where Dynamo cannot."""
    roles = {id(ids): Input("ids", "ids"), id(positions): Input("positions", "positions")}
    roles |= {id(mask): Input("mask", name) for name, mask in masks.items()}
    roles |= {id(tensor): Input("parameter", name) for name, tensor in tensors.items()}
    for layer, kv in enumerate(cache):
        parts: dict[InputKind, Any] = {"keys": kv.keys, "values": kv.values, "slots": kv.start}
        for kind, tensor in parts.items():
            if tensor is not None:
                roles[id(tensor)] = Input(kind, f"{kind}.{layer}", layer)
        for index, state in enumerate(kv.states):
            roles[id(state)] = Input("state", f"state.{layer}.{index}", layer)

    graph, examples = _dynamo_graph(step, ids, positions, dict(masks))
    constants: dict[str, Tensor] = {}
    for example in examples:
        if not isinstance(example, Tensor):
            raise PassError(f"the traced step takes {example!r}, which is not a tensor")
        if id(example) not in roles:
            # a constant tensor the model keeps outside its parameters and buffers
            name = f"constant.{len(constants)}"
            roles[id(example)], constants[name] = Input("parameter", name), example
    return DecoderGraph(
        graph=trace_to_aten(graph, examples),
        inputs=tuple(roles[id(example)] for example in examples),
        rows=ids.shape[1],
        cache_length=next((kv.keys.shape[2] for kv in cache if kv.keys is not None), 0),
        tensors={**tensors, **constants},
        windows=windows,
        positions=positions_known,
    )


def _dynamo_graph(step: Callable[..., Tensor], *inputs: Any) -> tuple[GraphModule, list[Any]]:
    seen: list[tuple[GraphModule, list[Any]]] = []

    def keep(graph: GraphModule, examples: list[Any]) -> Callable[..., Any]:
        seen.append((graph, examples))
        return graph.forward

    torch.compiler.reset()
    try:
        with torch.no_grad():
            torch.compile(step, backend=keep, fullgraph=True, dynamic=False)(*inputs)
    except Exception as error:
        text = str(error).strip()
        if "data-dependent" in text or "unbacked" in text.lower():
            reason = "its control flow depends on data: no one graph fits all tokens"
        else:
            reason = f"the decode step cannot be traced in one graph: {text.splitlines()[0]}"
        raise PassError(reason) from error
    finally:
        torch.compiler.reset()
    if len(seen) != 1:
        raise PassError(f"the decode step traced into {len(seen)} graphs instead of one")
    graph, examples = seen[0]
    for node in graph.graph.find_nodes(op="call_function", target=log_api_usage_once):
        graph.graph.erase_node(node)
    graph.recompile()
    return graph, examples


def trace_to_aten(graph: Callable[..., Any], examples: Sequence[Tensor]) -> GraphModule:
    """``graph`` as ATen operators, without switches of grad mode, its one result unwrapped."""
    with torch.no_grad():
        traced = make_fx(graph, tracing_mode="fake", pre_dispatch=True)(*examples)
    for node in reversed(list(traced.graph.nodes)):
        if node.op == "call_function" and getattr(node.target, "__name__", "") in MODE_SWITCHES:
            traced.graph.erase_node(node)
    output = traced.graph.output_node()
    values = output.args[0]
    if isinstance(values, (tuple, list)):
        if len(values) != 1:
            raise PassError(
                f"the decode step returns {len(values)} values instead of the logits alone: states "
                "kept in the modules, outside of the cache, cannot be followed"
            )
        output.args = (values[0],)
    traced.recompile()
    return traced
