"""``eepass inspect``: what the passes found in a model and what an artefact adds."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Any

from eepass.errors import PassError
from eepass.model import EarlyExitModel
from eepass.passes.exits.read_head_chain import read_head_chain
from eepass.passes.pipeline import exit_graph
from eepass.planning import exit_tensors
from eepass.segments import Segment, SplitDecoder


def describe(model: EarlyExitModel) -> dict[str, Any]:
    """Layers and how they were found, segments, exits, predictors, KV policy."""
    split, plan = model.splits[1], model.plan
    preset = model.config.name if model.config else ""
    trained = model.artifact.tensors if model.artifact else {}
    exits = [
        {
            **asdict(point),
            "predictor": sum(
                tensor.numel()
                for name, tensor in trained.items()
                if name.startswith(f"predictor.{preset}.{point.layer}.")
            ),
        }
        for point in (plan.exits if plan else ())
    ]
    draft = None
    if plan is not None:
        draft = f"after layer {plan.draft_layer}" if plan.draft_layer else "trained draft head"
    return {
        "layers": len(split.layers),
        "how": split.layers_found_by,
        "segments": len(split.layers),
        "distinct_segments": split.distinct_layers,
        "rows": sorted(model.splits),
        "head": split.head.reason
        or "norm, LM head" + (", transform" if split.head.transform else ""),
        "exit_kernels": _fused(split),
        "exits": exits,
        "draft": draft,
        "draft_tokens": plan.draft_tokens if plan else 0,
        "verify": plan.verify if plan else None,
        "kv_policy": plan.kv_policy if plan else "dense",
        "masks": dict(split.windows),
        "weights": _weight_forms(model),
        "cpu_kernels": model.compiler.kernels_missing or "built",
    }


def _weight_forms(model: EarlyExitModel) -> dict[str, int]:
    """Bytes a dense pass reads, by dtype."""
    found: Counter[str] = Counter()
    for name in model.splits[1].parameters:
        tensor = model.decoder.tensors[name]
        found[str(tensor.dtype).removeprefix("torch.")] += tensor.nbytes
    return dict(found)


def _fused(split: SplitDecoder) -> str:
    try:
        return f"fused: {read_head_chain(split.head)}"
    except PassError as error:
        return f"eager: {error}"


def exit_graph_of(model: EarlyExitModel) -> Segment | None:
    """The exit graph of a configured model; None for a dense one."""
    if model.plan is None or model.artifact is None or not model.config:
        return None
    split, own = model.splits[1], model.decoder.tensors
    tensors = {**own, **exit_tensors(model.config.name, model.artifact, own, split)}
    return exit_graph(split, model.plan, tensors)


def code_of(model: EarlyExitModel) -> str:
    """The exit graph as readable code: the chain, then each distinct branch; dense: the layers."""
    segment = exit_graph_of(model)
    if segment is None:
        seen: dict[str, str] = {}
        for number, layer in enumerate(model.splits[1].layers, 1):
            seen.setdefault(layer.structure, f"# layer {number}\n{layer.graph.code.strip()}")
        return "\n\n".join(seen.values())
    parts: list[tuple[str, Any]] = [("the chain", segment.graph), *segment.graph.named_children()]
    return "\n\n".join(f"# {name}\n{part.code.strip()}" for name, part in parts)
