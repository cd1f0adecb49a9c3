"""An artefact's card says what it is for, on what it was trained and what it gives."""

from dataclasses import replace

import pytest
from huggingface_hub import metadata_load
from models import random_artifact, tiny_model

from eepass.checkpoints.artifact import load_artifact
from eepass.checkpoints.models import LoadedModel
from eepass.training.card import card, licence_of, write_card

REPORT = {
    "examples": 2414,
    "tokens": {"fit": 229253, "calibrate": 20082},
    "kinds": {"code": 3, "letters": 5},
    "by_kind": {"held_out": True, "kinds": {"table": {
        "tokens": 99, "accepted": [0.5, 0.25], "a_pass": 1.625,
    }}},
}  # fmt: skip


@pytest.fixture(scope="module")
def artifact():
    return replace(random_artifact(tiny_model("llama")), report=REPORT)


def loaded(name):
    return LoadedModel(str(name), None, None, None)


def test_it_says_model_data_acceptance_versions_and_licence(tmp_path, artifact):
    model = tmp_path / "my-model"
    model.mkdir()
    (model / "README.md").write_text('---\ntags: [a]\nlicense: "apache-2.0"\n---\nlicense: mit\n')
    artifact.save(tmp_path / "made")
    write_card(tmp_path / "made", loaded(model), artifact)
    text = (tmp_path / "made" / "README.md").read_text()
    assert "# Drafts and exits for my-model" in text and str(tmp_path) not in text
    assert artifact.fingerprint["weights"] in text
    assert "tokens 229,253 (fit), 20,082 (calibrate)" in text and "code 3, letters 5" in text
    assert "| table | 0.50 | 0.25 | 1.62 |" in text
    assert "torch 2" in text and "transformers 5" in text and "the model's: apache-2.0" in text
    for name, part in artifact.presets.items():
        for calibration in part.calibrations:
            assert f"| {name} | {calibration.target} | {calibration.agreement:.3f} |" in text
    head = metadata_load(tmp_path / "made" / "README.md")
    assert head["license"] == "apache-2.0" and "base_model" not in head
    assert load_artifact(tmp_path / "made").report == REPORT


def test_a_model_from_a_hub_is_its_base(tmp_path, artifact, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").write_text(card(loaded("some/model"), replace(artifact, report={})))
    assert metadata_load("README.md")["base_model"] == "some/model"
    text = (tmp_path / "README.md").read_text()
    assert "eepass generate some/model --artifact DIR" in text
    assert "license" not in metadata_load("README.md") and "the model states none" in text
    assert "| data | not stated |" in text and "| kind |" not in text


def test_licences_are_read_where_they_stand():
    assert licence_of("smollm2") == "apache-2.0"
    assert licence_of("/nowhere/at/all") == licence_of("/nowhere/model.gguf") == ""
