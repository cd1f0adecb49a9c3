"""ONNX: the exported step gives what the engine gives, and does no more than it must."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import refused, run
from models import eager_compile, random_artifact, tiny_model, tiny_tokenizer

from eepass.checkpoints.models import LoadedModel
from eepass.config import ExitConfig
from eepass.errors import InputError
from eepass.model import EarlyExitModel, split_model

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

LENGTH, STEPS = 128, 40
# more tokens than the prompt's graph takes at once
PROMPT = [5 + (7 * i) % 120 for i in range(70)]
FAMILIES = ("llama", "gemma3", "gpt2")
# deep enough that not every exit is near the last one, and of a width nothing else has
SIZES = {"llama": {"num_hidden_layers": 8, "intermediate_size": 112}}


class Exported:
    """A tiny model in the engine, uncompiled, and exported; made when first asked for."""

    def __init__(self, family, folder):
        from eepass.onnx.export import export_onnx, propagating

        self.model = tiny_model(family, **SIZES.get(family, {}))
        self.config = propagating()
        artifact = random_artifact(self.model)
        if family == "llama":
            # from the model itself; the others from what was split already
            loaded = LoadedModel(family, self.model, tiny_tokenizer(), None)
            self.report = export_onnx(loaded, folder, artifact, self.config, LENGTH)
        splits, report = split_model(self.model, LENGTH, (1,))
        stop = frozenset({2})
        self.ready = EarlyExitModel(splits, report, stop, artifact, compiler=eager_compile)
        if family != "llama":
            loaded = LoadedModel(family, self.ready, tiny_tokenizer(), None, transformed=True)
            self.report = export_onnx(loaded, folder, None, self.config)
        self.folder = folder

    @property
    def decoder(self):
        from eepass.onnx.runtime import OnnxDecoder

        return OnnxDecoder(self.folder / "decode.onnx", threads=1)

    def engine_steps(self, config=None, prompt=PROMPT, dense=False):
        engine = self.ready.configure(config or self.config)
        engine = self.ready.dense if dense else engine
        return [tuple(step) for step in engine.generate(prompt, STEPS)]

    def onnx_steps(self, prompt=PROMPT, thresholds=None):
        found = self.decoder.stream(prompt, STEPS, thresholds, stop=frozenset())
        return [tuple(step) for step in found]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    made = {}

    def of(family="llama"):
        if family not in made:
            made[family] = Exported(family, tmp_path_factory.mktemp(family) / "onnx")
        return made[family]

    return of


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_tokens_exit_after_the_same_layers(exported, family):
    both = exported(family)
    expected = both.engine_steps()
    assert len({layer for _, layer in expected[1:]}) > 2
    assert both.onnx_steps() == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_without_exits_the_dense_answer(exported, family):
    both = exported(family)
    expected = both.engine_steps(dense=True)
    thresholds = both.decoder.dense()
    assert both.onnx_steps(thresholds=thresholds) == expected
    assert [token for token, _ in expected] != [token for token, _ in both.onnx_steps()]


def test_other_thresholds_are_an_input(exported):
    both = exported()
    strict = replace(both.config, threshold=0.6)
    expected = both.engine_steps(strict)
    assert expected != both.engine_steps()
    thresholds = both.decoder.dense()
    thresholds[2:] = 0.6
    assert both.onnx_steps(thresholds=thresholds) == expected


def test_predictors_follow_the_last_exits(exported):
    decoder = exported().decoder
    decoder.prefill(PROMPT)
    thresholds = decoder.dense()
    thresholds[5] = -1.0

    def left(token, *recent):
        step, after = decoder.step(token, len(PROMPT), np.array(recent), thresholds)
        assert after.tolist() == [*recent[1:], step.exit_layer]
        return step.exit_layer

    # nothing is known yet: all are evaluated
    token = next(token for token in range(3, 160) if left(token, 0, 0, 0, 0, 0) == 5)
    # 2 and 3 are always evaluated, besides those near the last exits
    assert left(token, 0, 0, 0, 0, 8) == 8
    assert left(token, 0, 0, 0, 8, 2) == 8
    assert left(token, 0, 0, 0, 8, 3) == 5
    assert left(token, 7, 8, 8, 8, 8) == 5


def wide_products(folder, prefix, token, thresholds):
    """The exit layer of one step, and how many products as wide as an MLP ran, as ONNX Runtime
    counts them."""
    width = SIZES["llama"]["intermediate_size"]
    options = ort.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(prefix)
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(folder / "decode.onnx"), options)
    kinds = {"tensor(float)": np.float32, "tensor(int64)": np.int64}
    inputs = {x.name: np.zeros(x.shape, kinds[x.type]) for x in session.get_inputs()}
    inputs |= {"ids": np.array([[token]]), "threshold": thresholds}
    outputs = dict(
        zip([x.name for x in session.get_outputs()], session.run(None, inputs), strict=True)
    )
    events = json.loads(Path(session.end_profiling()).read_text())
    wide = 0
    for event in events:
        if "MatMul" in event.get("args", {}).get("op_name", ""):
            (kind,) = event["args"]["output_type_shape"][0].values()
            wide += kind[-1] == width
    return int(outputs["exit_layer"][0]), wide


def test_an_exit_skips_the_layers_behind_it(exported, tmp_path):
    both = exported()
    decoder = both.decoder
    for layer in (2, 6, 8):
        thresholds = decoder.dense()
        thresholds[layer] = -1.0
        token = next(
            t
            for t in range(3, 160)
            if decoder.step(t, 0, np.zeros(5, int), thresholds)[0].exit_layer == layer
        )
        left, wide = wide_products(both.folder, tmp_path / str(layer), token, thresholds)
        # two a layer, and none in a layer that is skipped
        assert (left, wide) == (layer, 2 * layer)


def test_the_chain_is_flat_and_of_standard_operators(exported):
    both = exported()
    from eepass.onnx.files import describe

    found = describe(both.folder / "decode.onnx")
    # layers, the draft, predictor and verification at each exit, the head
    assert found["conditions"] == 8 + 1 + 2 * 7 + 1
    assert found["nested"] == 0
    assert list(found["opset"]) == ["ai.onnx"]
    assert found["kv_policy"] == "propagate"
    assert found["exits"] == {str(layer): 0.4 for layer in range(2, 9)}
    assert {"TopK", "Sigmoid", "Softmax"} <= set(found["operators"])
    assert "Loop" not in found["operators"]


def test_weights_are_stored_once(exported):
    both = exported()
    places = {}
    for name in ("decode.onnx", "prefill.onnx"):
        model = onnx.load(str(both.folder / name), load_external_data=False)
        for tensor in model.graph.initializer:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            if entries:
                assert entries["location"] == "weights.bin"
                places.setdefault(entries["offset"], set()).add((name, tensor.name))
        inside = [a.g for node in model.graph.node for a in node.attribute if a.HasField("g")]
        assert not any(graph.initializer for graph in inside)
    assert sum(len({file for file, _ in users}) == 2 for users in places.values()) > 30
    tensors = {p.data_ptr(): p.numel() for p in both.model.parameters()}
    assert len(places) >= len(tensors)
    # both graphs hold no weights of their own
    assert both.report["files"]["decode.onnx"] + both.report["files"]["prefill.onnx"] < 600_000


def test_from_the_command_line(exported, tmp_path):
    both = exported()
    file, out = both.folder / "decode.onnx", tmp_path / "answer.json"
    code, said, errors = run(
        "generate", file, "--prompt", "some text", "--max-new-tokens", 12, "--json", out
    )
    assert code == 0, errors
    answer = json.loads(out.read_text())
    assert len(answer["ids"]) <= 12 and answer["kv_policy"] == "propagate"
    assert any(layer < 8 for _, layer in answer["steps"])
    assert said.strip() == answer["text"].strip()
    code, said, errors = run("inspect", both.folder)
    assert code == 0, errors
    assert "kv_policy: propagate" in said


def test_what_is_wrong_is_said_in_one_line(exported, tmp_path, monkeypatch):
    both = exported()
    ask = ("--prompt", "text")
    assert "no such file" in refused("generate", tmp_path / "none.onnx", *ask)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    out = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    onnx.save(
        onnx.helper.make_model(
            onnx.helper.make_graph([node], "g", [value], [out]),
            ir_version=10,
            opset_imports=[onnx.helper.make_opsetid("", 20)],
        ),
        foreign / "model.onnx",
    )
    for name in ("tokenizer.json", "tokenizer_config.json", "prefill.onnx", "weights.bin"):
        assert "tokenizer" in (said := refused("generate", foreign / "model.onnx", *ask)) or (
            f"no {name} beside it" in said
        )
        shutil.copy(both.folder / name, foreign)
    assert "not written by eepass" in refused("generate", foreign / "model.onnx", *ask)
    assert "not written by eepass" in refused("inspect", foreign / "model.onnx")
    damaged = tmp_path / "damaged"
    shutil.copytree(both.folder, damaged)
    whole = (damaged / "decode.onnx").read_bytes()
    (damaged / "decode.onnx").write_bytes(whole[: len(whole) // 2])
    assert "decode.onnx" in refused("generate", damaged, *ask)
    assert "decode.onnx" in refused("inspect", damaged / "decode.onnx")
    (damaged / "decode.onnx").write_bytes(whole)
    weights = (damaged / "weights.bin").read_bytes()
    (damaged / "weights.bin").write_bytes(weights[:-4096])
    assert "weights.bin" in refused("generate", damaged, *ask)
    (damaged / "weights.bin").unlink()
    assert "no weights.bin beside it" in refused("generate", damaged, *ask)
    assert "do not fit" in refused("generate", both.folder, *ask, "--max-new-tokens", 400)
    assert "--kv" in refused("generate", both.folder, *ask, "--kv", "propagate")
    assert "--temperature" in refused("generate", both.folder, *ask, "--temperature", 0.7)
    assert "runs the prompt" in refused("generate", both.folder / "prefill.onnx", *ask)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert "pip install 'eepass[onnx]'" in refused("generate", both.folder, *ask)


def test_what_cannot_be_exported_is_refused_with_the_reason(exported, tmp_path):
    from eepass.onnx.export import export_onnx

    both = exported()
    bare = LoadedModel("tiny", both.model, tiny_tokenizer(), None)
    with pytest.raises(InputError, match="no artefact"):
        export_onnx(bare, tmp_path / "out")
    split = LoadedModel("tiny", both.ready, tiny_tokenizer(), None, transformed=True)
    with pytest.raises(InputError, match="ask for kv propagate or drop"):
        export_onnx(split, tmp_path / "out", None, ExitConfig().approximate())
    with pytest.raises(InputError, match="draft head"):
        paper = replace(ExitConfig.preset("paper"), kv="propagate")
        export_onnx(split, tmp_path / "out", None, paper)
    half = LoadedModel("half", tiny_model("llama").to(torch.bfloat16), tiny_tokenizer(), None)
    with pytest.raises(InputError, match="fp32"):
        export_onnx(half, tmp_path / "out", random_artifact(half.model), max_length=LENGTH)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    with pytest.raises(InputError, match="something else is there"):
        export_onnx(split, tmp_path / "taken")
    assert not (tmp_path / "out").exists()
