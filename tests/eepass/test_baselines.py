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
        self.options, self.seen, self.sampling = options, [], []

    def reset(self):
        self.seen.clear()

    def eval(self, tokens):
        self.seen.extend(tokens)

    def sample(self, **sampling):
        self.sampling.append(sampling)
        return len(self.seen)


@pytest.fixture
def llama_cpp(monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_cpp", SimpleNamespace(Llama=FakeLlama))


@pytest.mark.usefixtures("llama_cpp")
def test_llama_cpp_decodes_greedily_until_told_to_stop(tmp_path):
    decoder = LlamaCpp(tmp_path / "m.gguf", threads=2, context=64)
    assert decoder.llama.options["n_threads"] == decoder.llama.options["n_threads_batch"] == 2
    assert list(decoder.tokens([7, 7, 7], 4, frozenset())) == [3, 4, 5, 6]
    # the last token of an answer is never run
    assert decoder.llama.seen == [7, 7, 7, 3, 4, 5]
    assert list(decoder.tokens([7, 7, 7], 9, frozenset({5}))) == [3, 4, 5]
    greedy = {"temp": 0.0, "repeat_penalty": 1.0}
    assert all(sampling == greedy for sampling in decoder.llama.sampling)


@pytest.mark.usefixtures("llama_cpp")
def test_a_file_llama_cpp_refuses_is_named(tmp_path):
    with pytest.raises(InputError, match=r"bad\.gguf"):
        LlamaCpp(tmp_path / "bad.gguf", threads=1, context=64)


def test_llama_cpp_missing_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(InputError, match="pip install llama-cpp-python"):
        LlamaCpp(tmp_path / "m.gguf", threads=1, context=64)
