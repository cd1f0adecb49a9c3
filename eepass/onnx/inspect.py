"""``eepass inspect model.onnx``: what an exported graph holds."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from eepass.errors import InputError
from eepass.onnx.files import ENTRY, OnnxMetadata, needed


def describe(file: Path) -> dict[str, Any]:
    """The metadata of ``file`` and a summary of its graph; the weights are not read."""
    onnx = needed("onnx")
    try:
        model = onnx.load(str(file), load_external_data=False)
    except Exception as error:  # protobuf's and onnx's errors share no type
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise InputError(f"{file}: not an ONNX model that can be read ({reason})") from error
    entries = {entry.key: entry.value for entry in model.metadata_props}
    written = OnnxMetadata.read(entries.get(ENTRY), file)
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
    return {
        "model": written.name,
        "written_by": f"eepass {written.eepass}",
        "fingerprint": written.fingerprint,
        "opset": {entry.domain or "ai.onnx": entry.version for entry in model.opset_import},
        "layers": written.layers,
        "max_length": written.max_length,
        "kv_policy": written.kv_policy,
        "preset": written.preset,
        "target_agreement": written.target_agreement,
        "exits": written.exits,
        "draft": f"{written.draft_tokens} tokens after layer {written.draft_layer}",
        "verify": written.verify,
        "schedule": f"last {written.window} exits ± {written.radius}, {written.always} always",
        "conditions": len(branches),
        "nested": sum(node.op_type in ("If", "Loop", "Scan") for node in inside),
        "operators": dict(operators.most_common()),
        "inputs": [value.name for value in graph.input],
        "outputs": [value.name for value in graph.output],
        "weights": {**places, "bytes": written.weights},
    }
