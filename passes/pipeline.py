"""The passes in their order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from eepass.passes.decode_step import trace_decode_step
from eepass.passes.find_layers import find_layers
from eepass.passes.fit_rows import fit_rows
from eepass.passes.report import PassReport
from eepass.passes.split_segments import split_segments
from eepass.plan import SplitDecoder


def split_decoder(model: Any, rows: int, cache_length: int) -> tuple[SplitDecoder, PassReport]:
    """Trace ``model`` for one row count and split it; raises ``PassError`` with the reason."""
    report = PassReport()
    decoder = trace_decode_step(model, rows, cache_length)
    # before splitting: boundaries are nodes of the traced graph
    boundaries = find_layers(decoder, report)
    return split_segments(decoder, boundaries, report), report


def split_for_rows(
    model: Any, cache_length: int, step_rows: Sequence[int] = (1, 2, 4, 8), prefill_rows: int = 64
) -> tuple[dict[int, SplitDecoder], PassReport]:
    """``model`` split for each row count: three traces, the other counts fitted between them."""
    most = max(step_rows)
    one, report = split_decoder(model, 1, cache_length)
    splits = {1: one}
    if most > 1:
        splits[most], _ = split_decoder(model, most, cache_length)
    splits[prefill_rows], _ = split_decoder(model, prefill_rows, cache_length)
    for rows in step_rows:
        if rows not in splits:
            splits[rows] = fit_rows(splits[most], splits[prefill_rows], rows)
    return splits, report
