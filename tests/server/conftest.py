"""A tiny model behind servers that tests start as they need them; it runs as it was traced."""

import logging

import pytest
import torch
from models import eager_compile, tiny_model, tiny_tokenizer

import eepass
from eepass.checkpoints.models import LoadedModel
from eepass.runtime.engine.engine import Engine

pytest.importorskip("uvicorn", reason="the extra 'serve' is not installed")
pytest.importorskip("prometheus_client", reason="the extra 'serve' is not installed")
from api import Api


class AsTraced:
    """In place of a compiler."""

    kernels_missing = ""

    def __call__(self, graph, structure, examples, *, logits=False):
        return eager_compile(graph, structure, examples, logits=logits)


@pytest.fixture
def traced(monkeypatch):
    """Models are not compiled."""
    monkeypatch.setattr("eepass.early_exit_model._cpu_compiler", AsTraced)


@pytest.fixture(scope="session")
def original():
    """The model as transformers runs it; nothing it says ends by itself."""
    model = tiny_model("llama", num_hidden_layers=2)
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(scope="session")
def loaded(original):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("eepass.early_exit_model._cpu_compiler", AsTraced)
        ready = eepass.transform(original, max_length=512)
        # engines are made later
        _ = ready.compiler
    return LoadedModel("a/folder/tiny", ready, tiny_tokenizer(), None, transformed=True)


@pytest.fixture
def start(loaded):
    """Starts servers, which end with the test."""
    servers = []

    def started(what=loaded, **options):
        options = {"port": 0, "warm_up": False, "stop_timeout": 5, **options}
        server = eepass.serve(what, **options)
        servers.append(server)
        return Api(server)

    yield started
    for server in servers:
        server.kill_server(0)
        assert not server._thread.is_alive()
    logging.getLogger("eepass.server").handlers.clear()


@pytest.fixture
def api(start):
    """A server with the usual limits."""
    return start()


@pytest.fixture
def slowly(monkeypatch):
    """Every pass takes a while, so that answers last; returns how many there were."""
    import time

    passes = []
    step = Engine.step

    def slow(self, sequences=None):
        passes.append(len(self.sequences if sequences is None else sequences))
        time.sleep(0.01)
        step(self, sequences)

    monkeypatch.setattr(Engine, "step", slow)
    return passes


@pytest.fixture(scope="session")
def says(original):
    """What the model says in transformers' own loop, alone."""
    tokenizer = tiny_tokenizer()

    def said(count, text="hello_"):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        out = original.generate(ids, max_new_tokens=count, do_sample=False, custom_generate=None)
        return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)

    return said
