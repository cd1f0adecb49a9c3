"""Models that ``torch.compile`` or a loader wraps, at each door that takes a model."""

import pytest
import torch
from models import tiny_model
from prepared_model import PROMPT, both
from word_model import save_word_model

import eepass
from eepass.checkpoints.models import LoadedModel
from eepass.errors import InputError
from eepass.hf.prepared import is_prepared
from eepass.model import EarlyExitModel
from eepass.passes.report import PassReport
from eepass.server.running import openai_app, serve
from eepass.wrappers import compiled_inside


@pytest.fixture
def model():
    found = tiny_model("llama", num_hidden_layers=2)
    found.generation_config.update(eos_token_id=None, pad_token_id=0)
    return found


@pytest.fixture
def ready(llama_splits):
    return EarlyExitModel(llama_splits, PassReport(), frozenset(), None)


def test_what_torch_compile_wraps_is_prepared_inside(model):
    wrapped = torch.compile(model, backend="eager")
    assert compiled_inside(wrapped) is model
    eepass.prepare(wrapped, None, max_length=64)
    assert is_prepared(model) and "generate" not in vars(wrapped)
    theirs, ours = both(model, max_new_tokens=8)
    assert torch.equal(theirs, ours)
    assert torch.equal(wrapped.generate(PROMPT, max_new_tokens=8, do_sample=False), theirs)


def test_what_torch_compile_wraps_is_transformed_inside(model):
    wrapped = eepass.transform(torch.compile(model, backend="eager"), max_length=64)
    names = set(dict(model.named_parameters()))
    assert any(role.name in names for role in wrapped.splits[1].layers[0].inputs)
    theirs, _ = both(model, max_new_tokens=8)
    assert torch.equal(wrapped.generate(PROMPT, 8), theirs)


def test_prepare_says_what_it_wants_instead(model, ready):
    loaded = LoadedModel("tiny", model, None, None)
    for given, reason in (
        (ready, "EarlyExitModel: a transformed model, which decodes by itself"),
        (loaded, r"what eepass\.load returns holds the model: give its \.model"),
        (torch.nn.Linear(2, 2), "Linear: not a Hugging Face causal LM"),
        ("smollm2", "str: not a Hugging Face causal LM"),
    ):
        with pytest.raises(InputError, match=reason):
            eepass.prepare(given)


def test_transform_says_what_it_wants_instead(model):
    with pytest.raises(InputError, match=r"what eepass\.load returns holds the model"):
        eepass.transform(LoadedModel("tiny", model, None, None))
    with pytest.raises(InputError, match="str: not a Hugging Face causal LM"):
        eepass.transform("smollm2")


@pytest.mark.parametrize("door", (serve, openai_app))
def test_serving_says_what_it_wants_instead(model, ready, door):
    for given, reason in (
        (LoadedModel("tiny", ready, None, None), "a transformed model, which decodes by itself"),
        (ready, r"serve: EarlyExitModel is not what eepass\.load returns"),
        (model, r"serve: LlamaForCausalLM is not what eepass\.load returns"),
    ):
        with pytest.raises(InputError, match=reason):
            door(given, port=0)


def test_a_wrapped_model_is_served(tmp_path):
    loaded = eepass.load(str(save_word_model(tmp_path, artifact=False)), "fp32")
    wrapped = torch.compile(loaded.model, backend="eager")
    server = serve(LoadedModel("tiny", wrapped, loaded.tokenizer, None), port=0, warm_up=False)
    try:
        assert server.model.loaded.model is loaded.model
    finally:
        server.kill_server()
