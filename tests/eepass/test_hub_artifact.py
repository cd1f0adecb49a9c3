"""Artefacts from a hub: pinned, from the cache where that has them, and nothing else fetched."""

import json
import os

import pytest
from command_line import refused, run
from huggingface_hub import constants
from local_hub import local_hub
from models import random_artifact, tiny_model
from word_model import save_word_model

from eepass.checkpoints.artifact import MANIFEST, load_artifact
from eepass.errors import InputError


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with local_hub(monkeypatch, tmp_path / "cache") as running:
        made = tmp_path / "published"
        random_artifact(tiny_model("llama")).save(made)
        (made / "README.md").write_text("what people read\n")
        (made / "weights.bin").write_bytes(b"a pickle")
        running.repositories["someone/heads"] = made
        yield running


def test_the_files_of_one_commit_are_fetched_and_no_others(hub, monkeypatch):
    found = load_artifact("someone/heads@v1")
    assert found.tensors.keys() == load_artifact(hub.repositories["someone/heads"]).tensors.keys()
    commit = hub.commit("someone/heads")
    files = json.loads((hub.repositories["someone/heads"] / MANIFEST).read_text())["files"]
    assert {name for _, _, _, name in hub.asked} == {MANIFEST, *files}
    # a branch may move between two requests
    assert {r for _, _, r, name in hub.asked if name != MANIFEST} == {commit}
    asked = len(hub.asked)
    load_artifact(f"someone/heads@{commit}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    load_artifact("someone/heads@v1")
    assert len(hub.asked) == asked
    with pytest.raises(InputError, match="someone/heads: no such folder, and no such artefact"):
        load_artifact("someone/heads")


def test_what_is_not_there_is_said(hub):
    for spec in ("someone/else", "someone/heads@v2"):
        with pytest.raises(InputError, match=f"^{spec}: no such folder, .*check the name"):
            load_artifact(spec)
    manifest = hub.repositories["someone/heads"] / MANIFEST
    found = json.loads(manifest.read_text())
    for name in ("weights.bin", "model.safetensors", "../draft.safetensors"):
        manifest.write_text(json.dumps({**found, "files": {name: None}}))
        with pytest.raises(InputError, match=f"lists '{name}', which no artefact has"):
            load_artifact("someone/heads")
    assert not [name for _, _, _, name in hub.asked if name != MANIFEST]
    manifest.write_text(json.dumps({**found, "files": {"draft-01234567.safetensors": None}}))
    with pytest.raises(InputError, match=r"draft-01234567\.safetensors of its commit \w{40} is"):
        load_artifact("someone/heads")
    manifest.write_text("no JSON")
    with pytest.raises(InputError, match="damaged, not JSON"):
        load_artifact("someone/heads")


def test_a_folder_of_that_name_is_no_id(hub, tmp_path, monkeypatch):
    os.makedirs(tmp_path / "here" / "someone")
    os.rename(hub.repositories["someone/heads"], tmp_path / "here" / "someone" / "heads")
    monkeypatch.chdir(tmp_path / "here")
    load_artifact("someone/heads")
    assert not hub.asked


def test_the_command_line_names_the_commit(hub, tmp_path):
    model = save_word_model(tmp_path / "model")
    hub.repositories["someone/heads"] = model / "eepass"
    out = tmp_path / "found.json"
    pinned = f"someone/heads@{hub.commit('someone/heads')}"
    code, _, said = run(
        "inspect", model, "--artifact", "someone/heads", "--dtype", "fp32", "--json", out
    )
    assert code == 0 and f"artefact: {pinned}" in said
    found = json.loads(out.read_text())
    assert found["artifact"] == pinned and found["exits"]
    assert "no such folder" in refused("inspect", model, "--artifact", "someone/else")
