"""Check what passes leave against what they were given, bit for bit, and a trace against its model.

Compared are the logits, and the keys, values and states that are written. On a GPU a matrix product
need not be added up in the same order twice: there they may be apart by its rounding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from eepass.errors import PassError
from eepass.masks import causal_mask
from eepass.passes.graph_walk import MEMORY
from eepass.passes.runner import Check, segments_in
from eepass.segments import DecoderGraph, Input, SplitDecoder

# how many tokens a trace is compared over
TOKENS = 4
# of the largest value, after a decoder's layers; a mistake in a pass moves values by all of it
ROUNDING = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def computes_as(graph: DecoderGraph | SplitDecoder) -> Check:
    """The check that a result computes what ``graph`` computes at this moment."""
    expected = _outcome(graph)

    def check(result: DecoderGraph | SplitDecoder) -> None:
        refuse_difference(_outcome(result), expected)

    return check


def refuse_difference(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise ``PassError`` where logits, or other tensors by name, differ in a bit."""
    for name, tensor in expected.items():
        apart = rounding(tensor) if tensor.is_cuda else 0.0
        # weights that hold NaN are the engine's to name
        if not torch.allclose(found[name], tensor, rtol=0.0, atol=apart, equal_nan=True):
            does = "gives" if name == "logits" else "writes"
            raise PassError(f"the split decoder {does} other {name} than the traced one")


def rounding(tensor: Tensor) -> float:
    """How far values like ``tensor`` may be off where a GPU adds up in another order."""
    return ROUNDING.get(tensor.dtype, 0.0) * float(tensor.nan_to_num().abs().max())


def check_trace(model: Any, decoder: DecoderGraph) -> None:
    """Run a trace of one row over a few tokens; ``PassError`` where ``model`` without a cache gives
    other logits: it places tokens by something else than positions, masks and slots."""
    tokens = [5 + 3 * index for index in range(TOKENS)]
    memory: dict[Input, Tensor] = {}
    found = []
    for position, token in enumerate(tokens):
        inputs = _inputs(decoder, [token], position) | memory
        memory = {role: tensor for role, tensor in inputs.items() if role.kind in MEMORY}
        (logits,) = decoder.run(inputs.__getitem__)
        found.append(logits[0, -1])
    wanted = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
    scale, apart = wanted.abs().max(), (torch.stack(found) - wanted).abs().max()
    # low precision may send a token to another expert
    if apart > scale * (1e-3 if wanted.dtype == torch.float32 else 0.25):
        raise PassError(
            "token by token over a static cache it gives other logits than in one go "
            f"(apart by {float(apart):.2g} of {float(scale):.2g}): it does not place tokens by the "
            "positions and masks it is given"
        )


def _outcome(graph: DecoderGraph | SplitDecoder) -> dict[str, Tensor]:
    """Logits, and the memory by name, of one pass from slot 3 on over an empty cache."""
    # not the first ids: a padding token's embedding is zero, and zero hides mistakes
    inputs = _inputs(graph, [5 + index % 11 for index in range(graph.rows)], 3)
    with torch.no_grad():
        result: Any = graph.run(inputs.__getitem__)
    logits = result[0] if isinstance(graph, DecoderGraph) else result
    return {"logits": logits, **{r.name: t for r, t in inputs.items() if r.kind in MEMORY}}


def _inputs(
    graph: DecoderGraph | SplitDecoder, tokens: Sequence[int], start: int
) -> dict[Input, Tensor]:
    """The inputs of a pass of ``tokens`` from position and slot ``start`` on."""
    positions = torch.arange(start, start + len(tokens))
    given = {"ids": torch.tensor([list(tokens)]), "positions": positions[None], "slots": positions}
    found: dict[Input, Tensor] = {}
    for role, value in {r: v for _, s in segments_in(graph) for r, v in s.examples.items()}.items():
        if role.kind in given:
            found[role] = given[role.kind]
        elif role.kind == "mask":
            window, size = graph.windows[role.name], graph.cache_length
            found[role] = causal_mask(len(tokens), size, window, value.dtype, value.device, start)
        elif role.kind in MEMORY:
            found[role] = torch.zeros(value.shape, dtype=value.dtype)
        elif role.kind == "parameter":
            found[role] = graph.tensors[role.name].detach()
    return found
