"""The passes in their order, each timed, checked and, on request, written down."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from eepass.passes.report import PassReport
from eepass.passes.split.check import check_split, check_trace
from eepass.passes.split.find_layers import find_layers
from eepass.passes.split.fit_rows import fit_rows
from eepass.passes.split.split_segments import split_segments
from eepass.passes.trace.decode_step import trace_decode_step
from eepass.segments import SplitDecoder

STEP_ROWS = (1, 2, 4, 8)


def split_decoder(
    model: Any, rows: int, cache_length: int, dump: Path | None = None
) -> tuple[SplitDecoder, PassReport]:
    """Trace ``model`` for one row count and split it; raises ``PassError`` with the reason."""
    report = PassReport()
    decoder = trace_decode_step(model, rows, cache_length)
    if rows == 1:
        with torch.no_grad():
            check_trace(model, decoder)
    _write(dump, f"{rows}-rows.1-captured.py", decoder.graph.code)
    # before splitting: boundaries are nodes of the traced graph
    boundaries = find_layers(decoder, report)
    _write(dump, f"{rows}-rows.2-boundaries.txt", "\n".join(node.name for node in boundaries))
    split = split_segments(decoder, boundaries, report)
    _write(dump, f"{rows}-rows.3-split.py", _code(split))
    with torch.no_grad():
        check_split(decoder, split)
    return split, report


def split_for_rows(
    model: Any,
    cache_length: int,
    step_rows: Sequence[int] = STEP_ROWS,
    prefill_rows: int = 64,
    dump: Path | None = None,
) -> tuple[dict[int, SplitDecoder], PassReport]:
    """``model`` split for each row count: three traces, the other counts fitted between them.

    A model with recurrent states is split for one row alone.
    """
    most = max(step_rows)
    one, report = split_decoder(model, 1, cache_length, dump)
    splits = {1: one}
    if one.stepwise:
        return splits, report
    if most > 1:
        splits[most], _ = split_decoder(model, most, cache_length, dump)
    splits[prefill_rows], _ = split_decoder(model, prefill_rows, cache_length, dump)
    for rows in step_rows:
        if rows not in splits:
            splits[rows] = fit_rows(splits[most], splits[prefill_rows], rows)
    return splits, report


def _code(split: SplitDecoder) -> str:
    parts = {"embed": split.embed, "positional": split.positional, "head": split.head.whole}
    for number, layer in enumerate(split.layers):
        parts.setdefault(f"layer {layer.structure}", layer)
        parts[f"layer {number}"] = layer
    seen: set[str] = set()
    text = []
    for name, segment in parts.items():
        if segment.structure not in seen:
            seen.add(segment.structure)
            roles = "\n".join(f"#   {role.kind} {role.name}" for role in segment.inputs)
            text.append(f"# {name}\n{roles}\n{segment.graph.code.strip()}\n")
    return "\n".join(text)


def _write(folder: Path | None, name: str, text: str) -> None:
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text + "\n", encoding="utf-8")
