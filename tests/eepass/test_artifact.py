"""What is refused, by name of the file or field that does not fit."""

import dataclasses
import json

import pytest
import torch
from models import random_artifact, tiny_model

from eepass.checkpoints import artifact
from eepass.checkpoints.artifact import fingerprint, load_artifact
from eepass.checkpoints.draft_codes import as_codes, from_codes, rounded
from eepass.checkpoints.fitting_artifact import refuse_other_model
from eepass.errors import InputError
from eepass.model import transform


@pytest.fixture
def saved(llama, tmp_path):
    random_artifact(llama).save(tmp_path / "artifact")
    return tmp_path / "artifact"


def same(found, wanted):
    return found.keys() == wanted.keys() and all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype
        for name, tensor in wanted.items()
    )


def test_it_comes_back_as_it_was(llama, saved):
    first, second = random_artifact(llama), load_artifact(saved)
    assert second.presets == first.presets and second.fingerprint == first.fingerprint
    assert same(second.tensors, first.tensors)
    names = sorted(p.name for p in saved.iterdir())
    assert [name.partition("-")[0] for name in names] == ["draft", "eepass.json", "predictors"]
    # whoever reads other files reads these
    other = saved.parent / "other"
    other.touch()
    assert {p.stat().st_mode for p in saved.iterdir()} == {other.stat().st_mode}


def test_one_artefact_replaces_another_in_one_step(llama, saved, monkeypatch):
    """Killed before the manifest is written, it leaves the old one as it was."""
    old = load_artifact(saved)
    tensors = {n: t + 1 if t.is_floating_point() else t for n, t in old.tensors.items()}
    new = dataclasses.replace(old, tensors=tensors)

    def killed(path, text):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(artifact, "write_text_atomically", killed)
        new.save(saved)
    for now in (old, new):
        assert same(load_artifact(saved).tensors, now.tensors)
        new.save(saved)
    assert len(list(saved.iterdir())) == 3


def test_a_trained_head_takes_a_byte_a_weight_and_any_other_comes_back_too(llama, tmp_path):
    one = random_artifact(llama)
    for tensors, coded in ((one.tensors, 0), (rounded(one.tensors), 8)):
        dataclasses.replace(one, tensors=tensors).save(tmp_path)
        assert same(load_artifact(tmp_path).tensors, tensors)
        assert sum(name.endswith(".codes") for name in as_codes(tensors)) == coded
    # whatever it was rounded from
    for scale in (1e-6, 1e-3, 30):
        for dtype in (torch.float32, torch.bfloat16):
            made = rounded({"eagle.q": (torch.randn(40, 64) * scale).to(dtype)})
            codes = as_codes(made)
            assert codes["eagle.q.codes"].dtype == torch.int8
            assert torch.equal(from_codes(codes)["eagle.q"], made["eagle.q"])


def test_codes_without_their_scales_are_named():
    codes = as_codes(rounded({"eagle.q": torch.randn(8, 64)}))
    with pytest.raises(InputError, match=r"eagle\.q: codes without scales"):
        from_codes({"eagle.q.codes": codes["eagle.q.codes"]})


def test_an_artefact_without_hashes_is_read(saved):
    manifest = json.loads((saved / "eepass.json").read_text())
    for name in manifest.pop("files"):
        (saved / name).rename(saved / f"{name.partition('-')[0]}.safetensors")
    (saved / "eepass.json").write_text(json.dumps(manifest))
    assert load_artifact(saved).presets
    manifest["files"] = {"../predictors.safetensors": "0"}
    (saved / "eepass.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"\.\./predictors"):
        load_artifact(saved)


def test_the_fingerprint_does_not_depend_on_the_dtype():
    assert fingerprint(tiny_model().bfloat16()) == fingerprint(tiny_model())


@pytest.mark.parametrize("start", ("predictors", "draft", "eepass"))
def test_a_truncated_file_is_named(saved, start):
    (file,) = saved.glob(f"{start}*")
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match=file.name):
        load_artifact(saved)


def test_nan_is_refused_by_the_tensors_name(llama, saved):
    broken = random_artifact(llama)
    broken.tensors["translator.2.scale"][3] = float("nan")
    broken.save(saved)
    with pytest.raises(InputError, match=r"translator\.2\.scale"):
        load_artifact(saved)


def test_a_manifest_that_its_reader_refuses_is_refused_in_its_words(saved):
    def read(path):
        raise InputError(f"{path}: altered since it was written")

    with pytest.raises(InputError, match=r"eepass\.json: altered since it was written$"):
        load_artifact(saved, read)


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


@pytest.mark.parametrize("text", ("[]", "null", "3", '"eepass"', "[" * 100_000, "\xff"))
def test_a_manifest_that_is_no_object(saved, text):
    (saved / "eepass.json").write_text(text, encoding="latin-1")
    with pytest.raises(InputError, match=r"eepass\.json: damaged"):
        load_artifact(saved)


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        ("fingerprint", [], "fingerprint"),
        ("fingerprint.hidden", "64", "hidden is '64'"),
        ("fingerprint.layers", True, "layers is True"),
        ("presets", [], "field"),
        ("presets.default", None, "field"),
        ("presets.default.draft_layer", 9, "after layer 9"),
        ("presets.default.draft_tokens", 0, "0 draft tokens"),
        ("presets.default.draft_tokens", 17, r"predictor\.default.*w1 is float32"),
        ("presets.default.draft_tokens", 16.5, "no whole number"),
        ("presets.default.calibrations", [], "no calibrations"),
        ("presets.default.calibrations.0.thresholds", {"7": 0.4}, "layer 7 of 4"),
        ("presets.default.calibrations.0.thresholds", {"1": 0.4}, r"default\.1\.w1 is missing"),
        ("presets.default.calibrations.0.target", float("nan"), "no number"),
        ("presets.default.calibrations.0.target", "0.9", "no number"),
        ("presets.default.calibrations.0.ranking", [0], "layer 0 of 4"),
        ("report", 3, "field"),
    ],
)
def test_a_field_of_another_type_or_range(saved, place, value, said):
    manifest = json.loads((saved / "eepass.json").read_text())
    *path, last = place.split(".")
    inner = manifest
    for name in path:
        inner = inner[int(name)] if isinstance(inner, list) else inner[name]
    inner[last] = value
    (saved / "eepass.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=said):
        load_artifact(saved)


@pytest.mark.parametrize(
    ("name", "tensor", "said"),
    [
        ("hot.ids", torch.arange(96).float(), "not a list of ids"),
        ("hot.ids", torch.arange(96).int() + 100, "ids outside 0 to 159"),
        ("hot.ids", torch.arange(96).int() - 1, "ids outside"),
        ("hot.ids", torch.zeros(96).int(), "one twice"),
        ("hot.ids", torch.arange(8).int(), "8 tokens to draft 16 from"),
        ("hot.ids", None, "hot.ids is missing"),
        ("eagle.features", torch.tensor([1, 9]).int(), "ids outside 0 to 4"),
        ("eagle.fc", torch.zeros(64, 64), r"not \[64, 192\]"),
        ("eagle.q", torch.zeros(60, 128), r"eagle\.(k|v|o|q)"),
        ("eagle.rotary", torch.ones(5), "no heads of 10"),
        ("eagle.mix", torch.zeros(64, 192), "draft head is of a kind that is no longer read"),
        ("eagle.down", None, "eagle.down is missing"),
        ("translator.2.up", torch.zeros(64, 9), r"translator\.2\.up"),
        ("translator.2.scale", torch.zeros(63), r"translator\.2\.scale"),
        ("translator.9.scale", torch.zeros(64), "layers 1 to 4"),
        ("translator.2.up", torch.zeros(64, 8).int(), "int32"),
        ("predictor.default.3.w2", torch.zeros(3), r"predictor\.default\.3\.w2"),
        ("predictor.default.x.w2", torch.zeros(3), "layers 1 to 4"),
    ],
)
def test_a_tensor_of_another_shape_or_range(saved, name, tensor, said):
    found = load_artifact(saved)
    tensors = {n: t for n, t in found.tensors.items() if n != name}
    tensors |= {} if tensor is None else {name: tensor}
    dataclasses.replace(found, tensors=tensors).save(saved)
    with pytest.raises(InputError, match=said):
        load_artifact(saved)
