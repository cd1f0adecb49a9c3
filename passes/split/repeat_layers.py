"""Make of the split of a model's first layers the split of all its layers.

    traced for 1 row, all layers         A0 A1 B2 A3 A4 B5
    traced for 1 row, first layers       A0 A1 B2
    traced for 16 rows, first layers     A0' A1' B2'
    made for 16 rows, all layers         A0' A1' B2' A3' A4' B5'

Layers are of one kind where their code is the same for one row and they read the same side inputs.
A layer takes the code of the first one of its kind, and its own parameters and cache: those in the
places of the other's, in the traces for one row. Tracing takes seconds; this takes milliseconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from eepass.errors import PassError
from eepass.passes.report import PassReport
from eepass.segments import Input, Segment, SplitDecoder

# what each layer has of its own
OWN = ("parameter", "keys", "values", "state", "slots")


def layers_needed(whole: SplitDecoder) -> int:
    """How many of the first layers have one of every kind among them; at least two, since a single
    layer does not show where a layer ends."""
    return max(2, *(_kinds(whole).index(kind) + 1 for kind in _kinds(whole)))


def repeat_layers(
    few: SplitDecoder, report: PassReport, *, first: SplitDecoder, whole: SplitDecoder
) -> SplitDecoder:
    """``few`` with all layers. ``first`` and ``whole``: the same layers, and all of them, for one
    row. Raises ``PassError`` where the first layers are not a beginning of the whole."""
    _refuse_other_beginning(first, whole)
    for segment in (few.embed, few.positional, few.head.whole, *few.layers):
        for name in segment.parameters:
            ours, theirs = whole.tensors.get(name), few.tensors[name]
            if ours is None or (ours is not theirs and not ours.equal(theirs)):
                raise PassError(f"{name} is another tensor where there are fewer layers")
    kinds = _kinds(whole)
    like = [kinds.index(kind) for kind in kinds]
    report.rewritten += len(like) - len(few.layers)

    def repeated(segments: Sequence[Segment]) -> tuple[Segment, ...]:
        return tuple(
            replace(segments[model], inputs=_inputs(segments[model], whole, model, layer))
            for layer, model in enumerate(like)
        )

    return replace(
        few,
        tensors=whole.tensors,
        layers=repeated(few.layers),
        kv_fills=repeated(few.kv_fills),
        layers_found_by=whole.layers_found_by,
    )


def _inputs(segment: Segment, whole: SplitDecoder, model: int, layer: int) -> tuple[Input, ...]:
    """The inputs of ``segment``, of layer ``model``, as they are for ``layer`` of its kind."""
    pairs = zip(whole.layers[model].inputs, whole.layers[layer].inputs, strict=True)
    place = {ours: theirs for ours, theirs in pairs if ours.kind in OWN}
    found = []
    for role in segment.inputs:
        if role.kind in OWN and role not in place:
            raise PassError(f"with more rows layer {model} reads {role.name} as well")
        found.append(place.get(role, role))
    return tuple(found)


def _kinds(whole: SplitDecoder) -> list[tuple[str, tuple[Input, ...]]]:
    return [
        (layer.structure, tuple(role for role in layer.inputs if role.kind not in OWN))
        for layer in whole.layers
    ]


def _refuse_other_beginning(first: SplitDecoder, whole: SplitDecoder) -> None:
    pairs = [
        (first.embed, whole.embed), (first.positional, whole.positional),
        (first.head.whole, whole.head.whole),
        *zip(first.layers, whole.layers, strict=False),
    ]  # fmt: skip
    for ours, theirs in pairs:
        if (ours.structure, ours.inputs) != (theirs.structure, theirs.inputs):
            raise PassError("with fewer layers its layers are others")
