"""Baselines outside torch, against a stand-in for their package."""

import sys
from types import SimpleNamespace

import pytest

from eepass.benchmark.baselines import LlamaCpp
from eepass.errors import InputError


class FakeLlama:
    """Answers with the number of tokens it was given so far."""

    def __init__(self, model_path, **options):
        if "bad" in model_path:
            raise ValueError("no such model")
        self.options, self.run, self.sampling = options, [], {}

    def generate(self, tokens, **sampling):
        self.sampling = sampling
        while True:
            self.run.append(list(tokens))
            yield len(tokens)
            tokens = [*tokens, len(tokens)]


@pytest.fixture
def llama_cpp(monkeypatch):
    look_up = SimpleNamespace(LlamaPromptLookupDecoding=lambda num_pred_tokens: num_pred_tokens)
    monkeypatch.setitem(sys.modules, "llama_cpp", SimpleNamespace(Llama=FakeLlama))
    monkeypatch.setitem(sys.modules, "llama_cpp.llama_speculative", look_up)


@pytest.mark.usefixtures("llama_cpp")
def test_llama_cpp_decodes_greedily_until_told_to_stop(tmp_path):
    decoder = LlamaCpp(tmp_path / "m.gguf", threads=2, context=64)
    assert decoder.llama.options["n_threads"] == decoder.llama.options["n_threads_batch"] == 2
    assert decoder.llama.options["draft_model"] is None
    assert list(decoder.tokens([7, 7, 7], 4, frozenset())) == [3, 4, 5, 6]
    # the last token of an answer is never run
    assert decoder.llama.run[-1] == [7, 7, 7, 3, 4, 5]
    assert list(decoder.tokens([7, 7, 7], 9, frozenset({5}))) == [3, 4, 5]
    assert decoder.llama.sampling == {"temp": 0.0, "repeat_penalty": 1.0}


@pytest.mark.usefixtures("llama_cpp")
def test_llama_cpp_with_look_up_has_a_draft(tmp_path):
    decoder = LlamaCpp(tmp_path / "m.gguf", threads=2, context=64, look_up=True)
    assert decoder.llama.options["draft_model"] == 2


@pytest.mark.usefixtures("llama_cpp")
def test_a_file_llama_cpp_refuses_is_named(tmp_path):
    with pytest.raises(InputError, match=r"bad\.gguf"):
        LlamaCpp(tmp_path / "bad.gguf", threads=1, context=64)


def test_llama_cpp_missing_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(InputError, match="pip install llama-cpp-python"):
        LlamaCpp(tmp_path / "m.gguf", threads=1, context=64)
