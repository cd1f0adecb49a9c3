"""A model with exits, compiled by the backend."""

import pytest
import torch
from caller import COUNT, DEPTH, IDS, OTHER, Seen, artifact_of, compiled, generate
from models import tiny_model

from eepass.torch_compile import backend


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", num_hidden_layers=DEPTH)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("artefact") / "a"
    artifact_of(model).save(path)
    return path


@pytest.fixture(scope="module")
def exits(model, folder):
    """A step that exits early about half the time, and its tokens for each sequence alone."""
    torch._dynamo.reset()
    seen = Seen()
    step = compiled(model, folder, threshold=0.4, stats=seen)
    alone = {ids: generate(model, step, ids, COUNT)[0] for ids in (IDS, OTHER)}
    assert min(seen.layers) < DEPTH and len(set(seen.layers)) > 1, "no exits, nothing tested"
    return step, alone


@pytest.fixture(autouse=True)
def fresh_messages():
    backend.say_once.cache_clear()
