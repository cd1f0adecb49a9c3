"""Trace one decode step into an ATen graph whose placeholders have known roles.

before   step(ids [1, R], positions [1, R], masks) -> logits [1, R, V], over a static KV cache
after    a GraphModule of ATen operators; every placeholder is an ``Input``: a token tensor, a
         parameter by name, or the keys, values, length (``slots``) or states of a layer's cache
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from eepass.errors import PassError
from eepass.segments import DecoderGraph, Input, InputKind


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
    step: Callable[..., Tensor],
    ids: Tensor,
    positions: Tensor,
    masks: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    cache: Sequence[KvSlots],
    windows: Mapping[str, int | None],
    positions_known: int | None = None,
) -> DecoderGraph:
    """Trace ``step(ids, positions, masks)``; raises ``PassError`` where Dynamo cannot."""
    roles = {id(ids): Input("ids", "ids"), id(positions): Input("positions", "positions")}
    roles |= {id(mask): Input("mask", name) for name, mask in masks.items()}
    roles |= {id(tensor): Input("parameter", name) for name, tensor in tensors.items()}
    for layer, kv in enumerate(cache):
        for kind, tensor in (("keys", kv.keys), ("values", kv.values), ("slots", kv.start)):
            if tensor is not None:
                roles[id(tensor)] = Input(cast(InputKind, kind), f"{kind}.{layer}", layer)
        for index, state in enumerate(kv.states):
            roles[id(state)] = Input("state", f"state.{layer}.{index}", layer)

    graph, examples = _dynamo_graph(step, ids, positions, masks)
    constants: dict[str, Tensor] = {}
    for example in examples:
        if not isinstance(example, Tensor):
            raise PassError(f"the traced step takes {example!r}, which is not a tensor")
        if id(example) not in roles:
            # a constant tensor the model keeps outside its parameters and buffers
            role = Input("parameter", f"constant.{len(constants)}")
            roles[id(example)] = role
            constants[role.name] = example
    slots = next((kv.keys.shape[2] for kv in cache if kv.keys is not None), 0)
    return DecoderGraph(
        graph=trace_to_aten(graph, examples),
        inputs=tuple(roles[id(example)] for example in examples),
        rows=ids.shape[1],
        cache_length=slots,
        tensors={**tensors, **constants},
        windows=windows,
        positions=positions_known,
    )


def _dynamo_graph(
    step: Callable[..., Tensor], ids: Tensor, positions: Tensor, masks: Mapping[str, Tensor]
) -> tuple[GraphModule, list[Any]]:
    seen: list[tuple[GraphModule, list[Any]]] = []

    def keep(graph: GraphModule, examples: list[Any]) -> Callable[..., Any]:
        seen.append((graph, examples))
        return graph.forward

    torch._dynamo.reset()
    try:
        with torch.no_grad():
            torch.compile(step, backend=keep, fullgraph=True, dynamic=False)(
                ids, positions, dict(masks)
            )
    except Exception as error:
        text = str(error).strip()
        if "data-dependent" in text or "unbacked" in text.lower():
            raise PassError(
                "its control flow depends on data: no one graph fits all tokens"
            ) from error
        first = text.splitlines()[0]
        raise PassError(f"the decode step cannot be traced in one graph: {first}") from error
    finally:
        torch._dynamo.reset()
    if len(seen) != 1:
        raise PassError(f"the decode step traced into {len(seen)} graphs instead of one")
    graph, examples = seen[0]
    for node in graph.graph.find_nodes(
        op="call_function", target=torch._C._log_api_usage_once, sort=False
    ):
        graph.graph.erase_node(node)
    graph.recompile()
    return graph, examples


def trace_to_aten(graph: Callable[..., Any], examples: Sequence[Tensor]) -> GraphModule:
    """``graph`` as ATen operators, without switches of grad mode, its one result unwrapped."""
    with torch.no_grad():
        traced = make_fx(graph, tracing_mode="fake", pre_dispatch=True)(*examples)
    _strip_mode_switches(traced)
    _unwrap_output(traced)
    traced.recompile()
    return traced


def _strip_mode_switches(traced: GraphModule) -> None:
    """Drop nodes that switch grad mode or autocast: the step runs without either."""
    for node in reversed(list(traced.graph.nodes)):
        name = getattr(node.target, "__name__", "")
        if node.op == "call_function" and name in (
            "_set_grad_enabled",
            "_enter_autocast",
            "_exit_autocast",
        ):
            traced.graph.erase_node(node)


def _unwrap_output(traced: GraphModule) -> None:
    output = traced.graph.output_node()
    values = output.args[0]
    if isinstance(values, (tuple, list)):
        if len(values) != 1:
            raise PassError(
                f"the decode step returns {len(values)} values instead of the logits alone: states "
                "kept in the modules, outside of the cache, cannot be followed"
            )
        output.args = (values[0],)
