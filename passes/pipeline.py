"""All passes in their order.

    model --trace--> DecoderGraph --TRACED--> DecoderGraph --SPLIT--> SplitDecoder
    two SplitDecoders --fit_rows--> SplitDecoder for another row count
    SplitDecoder --insert_predictors--> ExitSegments --insert_exits--> exit graph
    SplitDecoder --fuse_exit_predictor--> FusedExits
    SplitDecoder --select_context--> ContextLayers
    a caller's step --trace--> DecoderGraph --CALLER, SPLIT--> SplitDecoder --> CallerStep

Each is a function ``(graph, report) -> graph`` with its options bound; ``PassRunner`` runs them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from eepass.errors import PassError
from eepass.passes.caller.caller_step import (
    check_caller_step,
    name_inputs,
    place_inputs,
    trace_caller_step,
)
from eepass.passes.caller.clean_trace import (
    add_masks,
    drop_conversions,
    inline_constants,
    refuse_writes_through_views,
    strip_advance,
)
from eepass.passes.caller.stack_rows import stack_rows
from eepass.passes.exits.fuse_exit_predictor import fuse_exit_predictor
from eepass.passes.exits.insert_exits import insert_exits
from eepass.passes.exits.insert_predictors import insert_predictors
from eepass.passes.report import PassReport
from eepass.passes.runner import Pass, PassRunner
from eepass.passes.split.check import check_trace, computes_as
from eepass.passes.split.find_layers import find_layers
from eepass.passes.split.fit_rows import fit_rows
from eepass.passes.split.repeat_layers import layers_needed, repeat_layers
from eepass.passes.split.select_context import select_context
from eepass.passes.split.split_segments import merge_equal_prelude, split_segments
from eepass.passes.trace.clean_step import (
    drop_dead_code,
    lift_constants,
    read_masks_by_slot,
    replace_lengths,
)
from eepass.passes.trace.decode_step import trace_decode_step
from eepass.passes.trace.first_layers import first_layers
from eepass.plan import ExitPlan, ExitSegments, FusedExits
from eepass.segments import CallerStep, ContextLayers, Segment, SplitDecoder

STEP_ROWS = (1, 2, 4, 8)

# on a traced decode step
TRACED: tuple[Pass, ...] = (
    lift_constants,
    replace_lengths,
    # after replace_lengths: reads the slots it puts in place of the lengths
    read_masks_by_slot,
    # last: what the others replaced is dead, such as the arange of a length's slots
    drop_dead_code,
)

SPLIT: tuple[Pass, ...] = (
    find_layers,
    # after find_layers: what does not depend on hidden state 0 is prelude
    merge_equal_prelude,
    # last on the whole graph: hidden states are nodes of it
    split_segments,
)


def split_decoder(
    model: Any, rows: int, cache_length: int, dump: Path | None = None
) -> tuple[SplitDecoder, PassReport]:
    """Trace ``model`` for one row count and split it; raises ``PassError`` with the reason."""
    runner = PassRunner(PassReport(), dump, f"{rows}-rows")
    # the model itself is compared with one row only: it is the slow part of the check
    check = partial(check_trace, model) if rows == 1 else None
    decoder = runner.run(trace_decode_step(model, rows, cache_length), TRACED, check)
    return runner.run(decoder, SPLIT, computes_as(decoder)), runner.report


def split_for_rows(
    model: Any, cache_length: int, step_rows: Sequence[int] = STEP_ROWS, prefill_rows: int = 64,
    dump: Path | None = None, wide_rows: Sequence[int] = (),
) -> tuple[dict[int, SplitDecoder], PassReport]:  # fmt: skip
    """``model`` split for each row count: a trace of all layers for one row, traces of the first
    layers for two more, the other counts fitted to them. ``wide_rows``: more counts, of chunks of
    prompts.

    A model with recurrent states is split for one row alone.
    """
    most = max(step_rows)
    one, report = split_decoder(model, 1, cache_length, dump)
    splits = {1: one}
    if one.stepwise:
        return splits, report
    split = _by_first_layers(model, one, cache_length, report, dump)
    for rows in (most, prefill_rows):
        if rows not in splits:
            splits[rows] = split(rows)
    for rows in (*step_rows, *wide_rows):
        if rows not in splits:
            fit = partial(fit_rows, many=splits[prefill_rows], rows=rows)
            splits[rows] = PassRunner(report, dump, f"{rows}-rows").run(splits[most], [fit])
    return splits, report


def _by_first_layers(
    model: Any, one: SplitDecoder, cache_length: int, report: PassReport, dump: Path | None
) -> Callable[[int], SplitDecoder]:
    """What splits ``model``, split as ``one`` for one row, for other row counts: by its first
    layers where they are a model by themselves, else by all."""
    count = layers_needed(one)

    def whole(rows: int) -> SplitDecoder:
        return split_decoder(model, rows, cache_length, dump)[0]

    if count >= len(one.layers):
        return whole
    try:
        small = first_layers(model, count)
        first, _ = split_decoder(small, 1, cache_length)
        # refuses what is no beginning of the model
        repeat_layers(first, PassReport(), first=first, whole=one)
    except PassError as error:
        report.note(f"all layers are traced for each row count: {error}")
        return whole

    def by_few(rows: int) -> SplitDecoder:
        few, _ = split_decoder(small, rows, cache_length, dump)
        repeat = partial(repeat_layers, first=first, whole=one)
        try:
            made: SplitDecoder = PassRunner(report, dump, f"{rows}-rows").run(few, [repeat])
        except PassError as error:
            report.note(f"all layers are traced for {rows} rows: {error}")
            return whole(rows)
        return made

    return by_few


def exit_segments(
    split: SplitDecoder, plan: ExitPlan, tensors: Mapping[str, Tensor], rows: int = 1
) -> ExitSegments:
    """What runs at the exit points of ``plan`` besides layers, for ``rows`` rows."""
    insert = partial(insert_predictors, plan=plan, tensors=tensors, rows=rows)
    return PassRunner(PassReport()).run(split, [insert])


def fused_exits(
    split: SplitDecoder, plan: ExitPlan, tensors: Mapping[str, Tensor], report: PassReport,
    rows: int = 1,
) -> FusedExits | None:  # fmt: skip
    """The same as one operator each; None where the head does not allow it, with the reason."""
    fuse = partial(fuse_exit_predictor, plan=plan, tensors=tensors, rows=rows)
    return PassRunner(report).run(split, [fuse])


def context_layers(
    split: SplitDecoder, width: int, depths: Sequence[float], report: PassReport
) -> ContextLayers:
    """The layers of ``split`` attending to up to ``width`` slots, selected at ``depths``, which are
    shares of the layers. Raises ``PassError`` where attention is not recognised."""
    select = partial(select_context, width=width, depths=depths)
    return PassRunner(report).run(split, [select])


def exit_graph(split: SplitDecoder, plan: ExitPlan, tensors: Mapping[str, Tensor]) -> Segment:
    """The decode step of one row with its exits as one graph."""
    # predictors first: they are built into the branches of the layers they follow
    insert = partial(insert_predictors, plan=plan, tensors=tensors)
    chain = partial(insert_exits, split, plan=plan, tensors=tensors)
    return PassRunner(PassReport()).run(split, [insert, chain])


def split_caller_step(
    step: Callable[..., Tensor], tensors: Sequence[Tensor], weights: Mapping[int, str],
    row_counts: Sequence[int], report: PassReport,
) -> CallerStep:  # fmt: skip
    """Split ``step``, a function of ``tensors`` to logits [B, 1, V] that adds to their caches.

    ``weights`` names parameters and buffers by ``id``. Layers are also made for ``row_counts`` rows
    of one sequence, if they take them; else ``report`` says why. Raises ``PassError`` where
    ``step`` is no decode step of one token a sequence, with the reason.
    """
    runner = PassRunner(report)
    decoder = runner.run(
        trace_caller_step(step, tensors),
        (
            inline_constants,
            # before dead code: what a conversion was of is read by it alone
            drop_conversions,
            drop_dead_code,
            refuse_writes_through_views,
            # before name_inputs: once lengths are written no more, what is written is a cache
            strip_advance,
            partial(name_inputs, tensors=tensors, weights=weights),
            # before the split: all layers share one additive mask, which is a side input
            add_masks,
        ),
    )
    split: tuple[Pass, ...] = (*SPLIT, partial(place_inputs, decoder=decoder))
    found = runner.run(decoder, split, partial(check_caller_step, step, tensors))
    # after the check: a step that goes row by row is right without it
    stack = partial(stack_rows, tensors=tensors, row_counts=row_counts)
    return runner.run(found, [stack])
