"""``eepass inspect model.onnx``: what an exported graph is made of."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from eepass.errors import InputError
from eepass.onnx.files import ENTRY, OnnxMetadata, needed


def describe(file: Path) -> dict[str, Any]:
    """What ``file`` says of itself, and what stands in it; the weights are not read."""
    onnx = needed("onnx")
    try:
        model = onnx.load(str(file), load_external_data=False)
    except Exception as error:  # protobuf's and onnx's errors share no type
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise InputError(f"{file}: not an ONNX model that can be read ({reason})") from error
    entries = {entry.key: entry.value for entry in model.metadata_props}
    said = OnnxMetadata.read(entries.get(ENTRY), file)
    graph = model.graph
    branches = [node for node in graph.node if node.op_type == "If"]
    inside = [
        node for branch in branches for attribute in branch.attribute for node in attribute.g.node
    ]
    operators = Counter(node.op_type for node in (*graph.node, *inside))
    places = Counter(
        entry.value
        for tensor in graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    )
    found = {
        "model": said.name,
        "written_by": f"eepass {said.eepass}",
        "fingerprint": said.fingerprint,
        "opset": {entry.domain or "ai.onnx": entry.version for entry in model.opset_import},
        "layers": said.layers,
        "max_length": said.max_length,
        "kv_policy": said.kv_policy,
        "preset": said.preset,
        "target_agreement": said.target_agreement,
        "exits": said.exits,
        "draft": f"{said.draft_tokens} tokens after layer {said.draft_layer}",
        "verify": said.verify,
        "schedule": f"last {said.window} exits ± {said.radius}, {said.always} always",
        "conditions": len(branches),
        "nested": sum(node.op_type in ("If", "Loop", "Scan") for node in inside),
        "operators": dict(operators.most_common()),
        "inputs": [value.name for value in graph.input],
        "outputs": [value.name for value in graph.output],
        "weights": {**places, "bytes": said.weights},
    }
    return found
