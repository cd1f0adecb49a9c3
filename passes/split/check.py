"""Check a split against the graph it came from: the same numbers, keys and values included."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from eepass.errors import PassError
from eepass.masks import causal_mask
from eepass.passes.graph_walk import MEMORY
from eepass.segments import DecoderGraph, Input, Segment, SplitDecoder

# how many tokens a trace is compared over
TOKENS = 4


def check_split(decoder: DecoderGraph, split: SplitDecoder) -> None:
    """Run both for one pass from slot 3 on; raises ``PassError`` where they differ in a bit."""
    whole, parts = _inputs(decoder), _inputs(decoder)
    expected = decoder.graph(*(whole[role] for role in decoder.inputs))

    def run(segment: Segment, extra: Mapping[str, Tensor]) -> list[Tensor]:
        arguments = [
            extra[role.name] if role.kind in ("hidden", "side") else parts[role]
            for role in segment.inputs
        ]
        result = segment.graph(*arguments)
        return list(result) if isinstance(result, (tuple, list)) else [result]

    hidden, *token_sides = run(split.embed, {})
    sides = dict(zip(split.embed_outputs[1:], token_sides, strict=True))
    sides |= dict(zip(split.side_outputs, run(split.positional, {}), strict=True))
    for layer in split.layers:
        (hidden,) = run(layer, {**sides, "hidden": hidden})
    (logits,) = run(split.head.whole, {"hidden": hidden})
    if not _same(logits, expected):
        raise PassError("the split decoder gives other logits than the traced one")
    for role in decoder.inputs:
        if role.kind in MEMORY and not _same(whole[role], parts[role]):
            raise PassError(f"the split decoder writes other {role.name} than the traced one")


def check_trace(model: Any, decoder: DecoderGraph) -> None:
    """Run the trace of one row over a few tokens; ``PassError`` where ``model`` without a cache
    says otherwise: it places tokens by something else than positions, masks and slots."""
    tokens = [5 + 3 * index for index in range(TOKENS)]
    inputs = _inputs(decoder)
    got = []
    for position, token in enumerate(tokens):
        for role in decoder.inputs:
            if role.kind == "ids":
                inputs[role] = torch.tensor([[token]])
            elif role.kind == "positions":
                inputs[role] = torch.tensor([[position]])
            elif role.kind == "slots":
                inputs[role] = torch.tensor([position])
            elif role.kind == "mask":
                window, dtype = decoder.windows[role.name], inputs[role].dtype
                inputs[role] = causal_mask(
                    1, decoder.cache_length, window, dtype, inputs[role].device, position
                )
        got.append(decoder.graph(*(inputs[role] for role in decoder.inputs))[0, -1])
    ids = torch.tensor([tokens])
    wanted = model(input_ids=ids, use_cache=False).logits[0]
    scale, apart = wanted.abs().max(), (torch.stack(got) - wanted).abs().max()
    # low precision may send a token to another expert
    if apart > scale * (1e-3 if wanted.dtype == torch.float32 else 0.25):
        raise PassError(
            "token by token over a static cache it gives other logits than in one go "
            f"(apart by {float(apart):.2g} of {float(scale):.2g}): it does not place tokens by the "
            "positions and masks it is given"
        )


def _same(a: Tensor, b: Tensor) -> bool:
    # weights that hold NaN are the engine's to name
    return torch.allclose(a, b, rtol=0.0, atol=0.0, equal_nan=True)


def _inputs(decoder: DecoderGraph) -> dict[Input, Tensor]:
    rows, slots, start = decoder.rows, decoder.cache_length, 3
    found: dict[Input, Tensor] = {}
    placeholders = decoder.graph.graph.find_nodes(op="placeholder")
    for role, placeholder in zip(decoder.inputs, placeholders, strict=True):
        value = placeholder.meta["val"]
        if role.kind == "ids":
            # not the first ids: a padding token's embedding is zero, and zero hides mistakes
            found[role] = 5 + torch.arange(rows)[None] % 11
        elif role.kind == "positions":
            found[role] = torch.arange(start, start + rows)[None]
        elif role.kind == "mask":
            window = decoder.windows[role.name]
            found[role] = causal_mask(rows, slots, window, value.dtype, value.device, start)
        elif role.kind in MEMORY:
            found[role] = torch.zeros(value.shape, dtype=value.dtype)
        elif role.kind == "slots":
            found[role] = torch.arange(start, start + rows)
        else:
            found[role] = decoder.tensors[role.name].detach()
    return found
