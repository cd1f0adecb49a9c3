"""Keep what tracing and splitting made of a model: graphs and roles, none of its weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from eepass.codegen.cpu.building import cache_dir
from eepass.kept.entries import Entries
from eepass.kept.keys import Unforeseen, model_key, tensors_key
from eepass.passes.report import PassReport
from eepass.plan import ExitPlan, ExitSegments
from eepass.reading import parse_json
from eepass.segments import SplitDecoder
from eepass.stored_graphs import GraphReader, GraphWriter, NotStorable

# the folder of entries in eepass's cache
KEPT = "kept"
GRAPHS, CONSTANTS = "graphs.json", "constants.safetensors"
# constants are what a model makes of Python numbers; more than this would be something else
MOST_CONSTANTS = 4 << 20
Splits = dict[int, SplitDecoder]


def kept_entries() -> Entries:
    """This user's entries."""
    return Entries(cache_dir() / KEPT)


def kept_splits(
    model: Any, options: Sequence[Any], split: Callable[[], tuple[Splits, PassReport]]
) -> tuple[Splits, PassReport, str]:
    """What ``split`` returns, or returned for a model of the same structure with the same
    ``options``; and the key of that, "" where nothing is kept of such a model."""
    try:
        key = "splits-" + model_key(model, *options)
    except Unforeseen:
        return *split(), ""
    entries = kept_entries()
    entry = entries.find(key)
    if entry is not None:
        try:
            text = (entry / GRAPHS).read_text(encoding="utf-8")
            return *_read(parse_json(text), (entry / CONSTANTS).read_bytes(), model), key
        except (OSError, KeyError, TypeError, ValueError, LookupError, AttributeError):
            entries.drop(key)
    splits, report = split()
    try:
        entries.write(key, _written(splits, report, model))
    except NotStorable:
        return splits, report, ""
    return splits, report, key


def kept_exits(
    key: str, plan: ExitPlan, tensors: Mapping[str, Tensor], rows: int,
    make: Callable[[], ExitSegments],
) -> ExitSegments:  # fmt: skip
    """What ``make`` returns, or returned for the model whose splits are kept under ``key`` and the
    same plan; ``tensors``: the artefact's."""
    if not key:
        return make()
    entries, own = kept_entries(), "exits-" + tensors_key(tensors, key, plan, rows)
    entry = entries.find(own)
    if entry is not None:
        try:
            stored = parse_json((entry / GRAPHS).read_bytes())
            return GraphReader(stored["graphs"]).exits(stored["exits"])
        except (OSError, KeyError, TypeError, ValueError, LookupError, AttributeError):
            entries.drop(own)
    made, writer = make(), GraphWriter()
    try:
        stored = {"exits": writer.parts(made), "graphs": writer.graphs}
        entries.write(own, {GRAPHS: json.dumps(stored).encode()})
    except NotStorable:
        pass
    return made


def _written(splits: Splits, report: PassReport, model: Any) -> dict[str, bytes]:
    writer = GraphWriter()
    parts = [writer.parts(split) for split in splits.values()]
    own = _tensors_of(model)
    constants = {n: t for n, t in splits[1].tensors.items() if n not in own}
    if sum(tensor.nbytes for tensor in constants.values()) > MOST_CONSTANTS:
        raise NotStorable("its constants are too large")
    stored = {
        "splits": parts, "graphs": writer.graphs, "rewritten": report.rewritten,
        "skipped": report.skipped, "notes": report.notes,
    }  # fmt: skip
    # one by one: safetensors refuses views of one storage
    plain = {name: tensor.detach().clone().contiguous() for name, tensor in constants.items()}
    return {GRAPHS: json.dumps(stored).encode(), CONSTANTS: save(plain)}


def _read(stored: Any, constants: bytes, model: Any) -> tuple[Splits, PassReport]:
    tensors = {**_tensors_of(model), **load(constants)}
    reader = GraphReader(stored["graphs"])
    splits = {part["rows"]: reader.split(part, tensors) for part in stored["splits"]}
    report = PassReport()
    report.rewritten = stored["rewritten"]
    report.skipped = [(where, reason) for where, reason in stored["skipped"]]
    report.notes = list(stored["notes"])
    return splits, report


def _tensors_of(model: Any) -> dict[str, Tensor]:
    """As a trace names them."""
    found: dict[str, Tensor] = dict([*model.named_parameters(), *model.named_buffers()])
    return found
