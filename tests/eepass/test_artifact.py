"""What is refused, by name of the file or field that does not fit."""

import json

import pytest
import torch
from models import random_artifact, tiny_model
from safetensors.torch import load_file, save_file

from eepass.checkpoints.artifact import fingerprint, load_artifact, refuse_other_model
from eepass.errors import InputError
from eepass.model import transform


@pytest.fixture
def saved(llama, tmp_path):
    random_artifact(llama).save(tmp_path / "artifact")
    return tmp_path / "artifact"


def test_it_comes_back_as_it_was(llama, saved):
    first, second = random_artifact(llama), load_artifact(saved)
    assert second.presets == first.presets and second.fingerprint == first.fingerprint
    assert second.tensors.keys() == first.tensors.keys()
    assert all(torch.equal(second.tensors[n], first.tensors[n]) for n in first.tensors)
    assert sorted(p.name for p in saved.iterdir()) == [
        "draft.safetensors", "eepass.json", "predictors.safetensors",
    ]  # fmt: skip


def test_the_fingerprint_does_not_depend_on_the_dtype():
    assert fingerprint(tiny_model().bfloat16()) == fingerprint(tiny_model())


@pytest.mark.parametrize("name", ("predictors.safetensors", "draft.safetensors", "eepass.json"))
def test_a_truncated_file_is_named(saved, name):
    data = (saved / name).read_bytes()
    (saved / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match=name):
        load_artifact(saved)


def test_nan_is_refused_by_the_tensors_name(saved):
    tensors = load_file(saved / "predictors.safetensors")
    tensors["translator.2.scale"][3] = float("nan")
    save_file(tensors, saved / "predictors.safetensors")
    with pytest.raises(InputError, match=r"translator\.2\.scale"):
        load_artifact(saved)


def test_another_schema_and_a_missing_field_are_named(saved):
    manifest = json.loads((saved / "eepass.json").read_text())
    (saved / "eepass.json").write_text(json.dumps({**manifest, "schema": 99}))
    with pytest.raises(InputError, match="schema 99"):
        load_artifact(saved)
    del manifest["presets"]["paper"]["draft_layer"]
    (saved / "eepass.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="draft_layer"):
        load_artifact(saved)


def test_an_artefact_of_another_model_is_refused(llama, saved):
    with pytest.raises(InputError, match="architecture"):
        transform(tiny_model("qwen3"), saved)
    other = tiny_model("llama")
    other.model.layers[1].mlp.up_proj.weight.data.add_(0.1)
    with pytest.raises(InputError, match="weights"):
        refuse_other_model(load_artifact(saved), other, saved)


def test_a_target_beyond_the_calibration_is_refused(saved):
    with pytest.raises(InputError, match=r"calibrated up to 0\.98"):
        load_artifact(saved).presets["default"].at_target(0.995)


def test_no_artefact_at_all(tmp_path):
    with pytest.raises(InputError, match="no artefact here"):
        load_artifact(tmp_path)
