"""What ``eepass.prepare`` keeps with a model, and what its ``generate`` refuses."""

import copy
import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from models import random_artifact, tiny_model
from prepared_model import PROMPT, Recorder, both, prepared_model
from transformers import AutoModelForCausalLM, GenerationMixin

import eepass
from eepass.checkpoints.fitting_artifact import found_artifact
from eepass.config import ExitConfig
from eepass.errors import InputError
from eepass.hf import prepared
from eepass.hf.prepared import in_use


@pytest.fixture(scope="module")
def model():
    return prepared_model()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"num_beams": 2}, "beam_search.*num_beams"),
        ({"prompt_lookup_num_tokens": 3}, "drafts by itself"),
        ({"guidance_scale": 1.5}, "guidance_scale"),
        ({"cache_implementation": "quantized"}, "quantized|backend|quanto"),
        ({"return_dict_in_generate": True, "output_hidden_states": True}, "output_hidden_states"),
        ({"attention_mask": torch.tensor([[1] * 9 + [0]])}, "padding_side='left'"),
        ({"attention_mask": torch.tensor([[1, 0] + [1] * 8])}, "padding_side='left'"),
        ({"position_ids": torch.arange(3, 13)[None]}, "position_ids"),
        ({"inputs_embeds": torch.zeros(1, 10, 64)}, "inputs_embeds"),
        ({"max_new_tokens": 500}, "prepared for 256"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refused_by_name(model, options, reason):
    with pytest.raises((InputError, ImportError, ValueError), match=reason):
        model.generate(PROMPT, **{"max_new_tokens": 8, **options})


def test_a_cache_of_the_caller_is_refused(model):
    filled = model.generate(
        PROMPT, max_new_tokens=4, custom_generate=None, return_dict_in_generate=True
    )
    with pytest.raises(InputError, match="past_key_values"):
        model.generate(filled.sequences, past_key_values=filled.past_key_values, max_new_tokens=4)
    with pytest.raises(InputError, match="assistant_model"):
        model.generate(PROMPT, assistant_model=tiny_model("llama"), max_new_tokens=4)


def test_approximate_refuses_what_needs_all_logits():
    model = tiny_model("llama")
    model.generation_config.eos_token_id = None
    eepass.prepare(model, random_artifact(model), ExitConfig().approximate(), max_length=128)
    for options, name in (
        ({"repetition_penalty": 1.2}, "RepetitionPenalty"),
        ({"no_repeat_ngram_size": 2}, "NoRepeatNGram"),
        ({"output_scores": True, "return_dict_in_generate": True}, "output_scores"),
    ):
        with pytest.raises(InputError, match=name):
            model.generate(PROMPT, max_new_tokens=4, **options)
    torch.manual_seed(0)
    # never a near tie: with so many exits some answer is not the dense one
    said = model.generate(PROMPT, max_new_tokens=64, do_sample=True, top_k=3)
    assert said.shape == (1, 74)
    assert not torch.equal(*both(model, max_new_tokens=64))


def test_anew_for_other_weights_and_freed_with_the_model(caplog):
    model = tiny_model("llama", num_hidden_layers=2)
    assert torch.equal(*both(model))
    with in_use(model, 1) as first:
        pass
    assert torch.equal(*both(model))
    with in_use(model, 1) as transformed:
        assert transformed is first
    assert not _warnings(caplog)
    model.lm_head.weight.mul_(-1)
    assert torch.equal(*both(model))
    assert ["weight has changed" in text for text in _warnings(caplog)] == [True]
    with in_use(model, 1) as transformed:
        assert transformed is not first
    model.train()
    with pytest.raises(InputError, match="training mode"):
        model.generate(PROMPT, custom_generate=eepass.generate, max_new_tokens=4)
    alive = weakref.ref(model), weakref.ref(transformed)
    del model, transformed, first
    gc.collect()
    assert [ref() for ref in alive] == [None, None]


def test_the_cache_grows_unless_its_length_was_asked_for(caplog, monkeypatch):
    asked = []

    def transform(model, artifact, config, max_length):
        asked.append(max_length)
        return SimpleNamespace(decoder=SimpleNamespace(max_sequence_length=max_length))

    monkeypatch.setattr(prepared, "transform", transform)
    model = tiny_model("llama", num_hidden_layers=1, max_position_embeddings=6000)
    for length in (10, 1024, 1025, 600, 5000):
        with in_use(model, length) as transformed:
            assert transformed.decoder.max_sequence_length >= length
    assert asked == [1024, 2048, 6000]
    assert ["room for" in text for text in _warnings(caplog)] == [True, True]
    eepass.prepare(model, max_length=512)
    with pytest.raises(InputError, match="prepared for 512"), in_use(model, 513):
        pass
    assert asked[3:] == [512]


def _warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "eepass"]


def test_artefacts_are_found(tmp_path):
    model = tiny_model("llama")
    assert found_artifact(model) is None
    model.save_pretrained(tmp_path)
    random_artifact(model).save(tmp_path / "eepass")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert found_artifact(loaded) == tmp_path / "eepass"
    with pytest.raises(InputError, match="no artefact here"):
        eepass.prepare(loaded, tmp_path, max_length=64)


def test_other_callables_get_what_transformers_gives_them(model):
    seen = {}

    def own(model, input_ids, generation_config, **kwargs):
        seen.update(kwargs)
        return input_ids

    model.generate(PROMPT, custom_generate=own, streamer=Recorder(), max_new_tokens=4)
    assert "streamer" not in seen


def test_transformers_itself_is_not_patched(model):
    """What prepare changes is the one model it is given."""
    for name in ("generate", "_extract_generation_mode_kwargs"):
        assert getattr(GenerationMixin, name).__module__ == "transformers.generation.utils"
        assert name in vars(model) and name not in vars(type(model))


def test_a_streamer_that_transformers_withholds_is_refused():
    """Only a prepared model hands it to a callable; dropped in silence it would say nothing."""
    bare = tiny_model("llama", num_hidden_layers=1)
    bare.generation_config.update(eos_token_id=None, pad_token_id=0)
    options = {"max_new_tokens": 4, "do_sample": False, "custom_generate": eepass.generate}
    for name, value in (("streamer", Recorder()), ("assistant_model", bare)):
        with pytest.raises(InputError, match=rf"{name}: .*call eepass.prepare\(model\)"):
            bare.generate(PROMPT, **options, **{name: value})
    assert bare.generate(PROMPT, **options).shape == (1, 14)
    eepass.prepare(bare, None, max_length=64)
    streamer = Recorder()
    bare.generate(PROMPT, **options, streamer=streamer)
    assert len(streamer.put_values) == 1 + 4 and streamer.ended == 1


def test_a_copy_of_a_prepared_model_is_its_own(model):
    """It hands on what it is given, and is transformed by itself."""
    other = copy.deepcopy(model)
    streamer = Recorder()
    expected = model.generate(PROMPT, max_new_tokens=4, do_sample=False)
    found = other.generate(PROMPT, max_new_tokens=4, do_sample=False, streamer=streamer)
    assert torch.equal(found, expected) and streamer.ended == 1
    with in_use(other, 1) as mine, in_use(model, 1) as theirs:
        assert mine is not theirs
