"""Trace a decode step over a cache that is the caller's, and tie its segments to the call.

before   Dynamo's graph of one call: ids [B, 1], masks, parameters, keys, values, lengths
after    the segments of ``split_segments``, and which of the call's tensors each one reads
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from eepass.errors import PassError
from eepass.passes.report import PassReport
from eepass.passes.split.check import refuse_difference
from eepass.passes.split.split_segments import build_segment
from eepass.passes.trace.capture import trace_to_aten
from eepass.segments import CallerStep, DecoderGraph, Input, SplitDecoder


def trace_caller_step(step: Callable[..., Tensor], tensors: Sequence[Tensor]) -> DecoderGraph:
    """``step``, a function of ``tensors`` to logits [B, 1, V]; inputs are numbered, not named."""
    try:
        traced = trace_to_aten(step, tensors)
    except (RuntimeError, NotImplementedError, TypeError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise PassError(f"its graph cannot be traced to ATen: {first}") from error
    inputs = tuple(Input("positions", f"caller.{place}") for place in range(len(tensors)))
    return DecoderGraph(traced, inputs, rows=1, cache_length=0, tensors={}, windows={})


def place_inputs(split: SplitDecoder, report: PassReport, *, decoder: DecoderGraph) -> CallerStep:
    """Tie the inputs of ``split`` to places in the call, as ``decoder`` has them.

    Side inputs that are inputs of the call are not passed through the prelude.
    """
    places = {role: place for place, role in enumerate(decoder.inputs)}
    caches = [role for role in decoder.inputs if role.layer >= 0]
    # keys before values, layer by layer
    caches.sort(key=lambda role: (role.layer, role.kind))
    role = split.positional.roles
    sides = dict(zip(split.side_outputs, split.positional.outputs, strict=True))
    passed = {name: places[role[node]] for name, node in sides.items() if node in role}
    made = {name: node for name, node in sides.items() if node not in role}
    report.rewritten = len(passed)
    positional = build_segment([], list(made.values()), role)
    return CallerStep(
        split=replace(split, positional=positional, side_outputs=tuple(made)),
        places=places,
        passed=passed,
        caches=tuple(places[role] for role in caches),
        advance=decoder.advance,
        batch=int(decoder.examples[caches[0]].shape[0]),
        logits=decoder.outputs[0].meta["val"],
        stacked={},
    )


def check_caller_step(
    step: Callable[..., Tensor], tensors: Sequence[Tensor], found: CallerStep
) -> None:
    """Run both on copies of what they write to; raises ``PassError`` where they differ in a bit."""
    written = {*found.caches, *(place for place, _ in found.advance)}
    whole, parts = (
        [t.clone() if place in written else t for place, t in enumerate(tensors)] for _ in range(2)
    )
    with torch.no_grad():
        expected = step(*whole)
        logits = found.split.run(found.value_of(parts))
        for place, rows in found.advance:
            parts[place].add_(rows)
    refuse_difference(
        {"logits": logits, **{f"input {place}": parts[place] for place in sorted(written)}},
        {"logits": expected, **{f"input {place}": whole[place] for place in sorted(written)}},
    )
