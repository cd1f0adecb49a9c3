"""The files ``eepass export-onnx`` writes, their metadata, and what they hold."""

from __future__ import annotations

import importlib
import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from eepass.errors import InputError
from eepass.reading import from_json, parse_json

SCHEMA = 1
DECODE, PROMPT, WEIGHTS = "decode.onnx", "prefill.onnx", "weights.bin"
# the key of our entry in a model's metadata
ENTRY = "eepass"
# a threshold no probability exceeds
NEVER = 2.0
AGAIN = "run eepass export-onnx again"


@dataclass(frozen=True, slots=True)
class OnnxMetadata:
    """The metadata of both graphs of a folder: JSON in the entry ``eepass``.

    ``exits``: threshold by layer; ``window``, ``radius``, ``always``: the schedule of predictors;
    ``prompt_rows``: tokens ``prefill.onnx`` runs at once; ``slots``: length of the caches;
    ``weights``: bytes of ``weights.bin``.
    """

    name: str
    eepass: str
    fingerprint: dict[str, Any]
    layers: int
    max_length: int
    slots: int
    prompt_rows: int
    stop: list[int]
    kv_policy: str
    verify: str
    preset: str
    target_agreement: float
    draft_layer: int
    draft_tokens: int
    exits: dict[str, float]
    window: int
    radius: int
    always: int
    weights: int
    schema: int = SCHEMA

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def read(cls, text: str | None, file: Path) -> OnnxMetadata:
        """From the metadata entry of ``file``; raises ``InputError`` if eepass did not write it."""
        if text is None:
            raise InputError(f"{file}: not written by eepass export-onnx")
        try:
            found = parse_json(text)
            schema = found["schema"]
            if schema == SCHEMA:
                return from_json(cls, found)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{file}: its metadata are damaged ({error}); {AGAIN}") from error
        raise InputError(f"{file}: schema {schema!r}, this eepass reads {SCHEMA}; {AGAIN}")


def is_onnx(spec: str) -> bool:
    """Whether MODEL names an ONNX file, or a folder that holds an exported model."""
    path = Path(spec)
    return path.suffix == ".onnx" or (path / DECODE).is_file()


def decode_file(spec: str) -> Path:
    """The decode graph MODEL names; raises ``InputError`` if it is not there."""
    path = Path(spec)
    file = path if path.suffix == ".onnx" else path / DECODE
    if file.name == PROMPT:
        raise InputError(f"{file}: this graph runs the prompt; give {DECODE} beside it")
    if not file.is_file():
        raise InputError(f"{file}: no such file; eepass export-onnx MODEL --out DIR writes it")
    return file


def needed(module: str) -> Any:
    """Import a package of the extra ``onnx``; raises ``InputError`` saying how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(f"ONNX needs {module}: pip install 'eepass[onnx]'") from error


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
    inside = [node for branch in branches for case in branch.attribute for node in case.g.node]
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
