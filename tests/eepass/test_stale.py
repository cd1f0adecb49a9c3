"""A prepared model whose behaviour changes otherwise than through its parameters."""

import copy
import pickle
import sys

import pytest
import torch
from models import tiny_model
from torch import nn

import eepass
from eepass.errors import InputError
from eepass.hf import prepared
from eepass.hf.prepared import in_use

PROMPT = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 5, 6, 7]])
COUNT = 12


class Scaled(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.factor = inner, torch.tensor(-1.0)
        self.eval()

    def forward(self, x):
        return self.inner(x) * self.factor


class Backwards(type(tiny_model("llama").model.norm)):
    def forward(self, hidden):
        return -super().forward(hidden)


@pytest.fixture
def model():
    found = tiny_model("llama", num_hidden_layers=2)
    found.generation_config.update(eos_token_id=None, pad_token_id=0)
    found.model.layers[0].mlp.act_fn.gains = {"all": [1.0]}
    eepass.prepare(found, None, max_length=64)
    return found


def both(model):
    options = {"max_new_tokens": COUNT, "do_sample": False}
    theirs = model.generate(PROMPT, custom_generate=None, **options)
    return theirs, model.generate(PROMPT, **options)


def inv_freq(model):
    model.model.rotary_emb.inv_freq.mul_(0.01)


def another_inv_freq(model):
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq * 0.01


def epsilon(model):
    model.model.layers[1].post_attention_layernorm.variance_epsilon = 30.0


def scaling(model):
    model.model.layers[0].self_attn.scaling = 5.0


def another_module(model):
    model.model.layers[0].mlp.down_proj = Scaled(model.model.layers[0].mlp.down_proj)


def another_class(model):
    model.model.norm.__class__ = Backwards


def another_forward(model):
    mlp = model.model.layers[1].mlp
    mlp.forward = lambda x: -type(mlp).forward(mlp, x)


def another_method(model):
    kind = type(model.model.layers[0].mlp)
    before = kind.forward
    kind.forward = lambda self, x: -before(self, x)
    return lambda: setattr(kind, "forward", before)


def another_function(model):
    home = sys.modules[type(model).__module__]
    before = home.rotate_half
    home.rotate_half = lambda x: -before(x)
    return lambda: setattr(home, "rotate_half", before)


def fewer_layers(model):
    del model.model.layers[1]
    model.config.num_hidden_layers = 1


def attention_of_the_config(model):
    model.config._attn_implementation = "eager"


def value_in_a_list(model):
    model.model.layers[0].mlp.act_fn.gains["all"][0] = 2.0


CHANGES = (
    inv_freq, another_inv_freq, epsilon, scaling, another_module, another_class, another_forward,
    another_method, another_function, fewer_layers,
)  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_is_traced_anew(model, change, caplog):
    before = both(model)[0]
    undo = change(model)
    try:
        theirs, ours = both(model)
    finally:
        if undo:
            undo()
    assert not torch.equal(theirs, before), "the change changes nothing"
    assert torch.equal(theirs, ours)
    assert "has changed" in caplog.text


@pytest.mark.parametrize("change", (attention_of_the_config, value_in_a_list))
def test_a_change_that_may_matter_is_traced_anew(model, change):
    with in_use(model, 1) as first:
        pass
    change(model)
    with in_use(model, 1) as second:
        assert second is not first


def test_a_tensor_among_attributes_is_watched(model):
    another_module(model)
    before = both(model)[0]
    model.model.layers[0].mlp.down_proj.factor.fill_(1.0)
    theirs, ours = both(model)
    assert torch.equal(theirs, ours) and not torch.equal(theirs, before)


@pytest.mark.parametrize("kind", ("register_forward_hook", "register_forward_pre_hook"))
def test_a_hook_is_refused_by_name_until_it_is_removed(model, kind):
    expected = both(model)[1]
    handle = getattr(model.model.layers[1], kind)(lambda *_: None)
    with pytest.raises(InputError, match=r"model\.layers\.1 has a forward hook .*remove it"):
        model.generate(PROMPT, max_new_tokens=4)
    handle.remove()
    assert torch.equal(both(model)[1], expected)


def test_a_module_in_training_mode_is_refused_by_name(model):
    model.model.layers[1].mlp.train()
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp.* training mode: call model.eval"):
        model.generate(PROMPT, max_new_tokens=4)
    model.eval()
    assert torch.equal(*both(model))


def test_what_changes_nothing_is_not_traced_anew(model):
    """What transformers does by itself, and what is of no account."""
    with in_use(model, 1) as first:
        pass
    assert torch.equal(*both(model))
    model(PROMPT, output_hidden_states=True, use_cache=False)
    model.generate(PROMPT, custom_generate=None, max_new_tokens=4, num_beams=2)
    model.generation_config.temperature = 0.5
    model.name_or_path = "elsewhere"
    model.lm_head.register_full_backward_hook(lambda *_: None)
    copy.deepcopy(model)
    model.to(torch.float32)
    with in_use(model, 1) as second:
        assert second is first


def test_copies_start_from_nothing(model):
    for other in (copy.deepcopy(model), copy.copy(model), pickle.loads(pickle.dumps(model))):
        with in_use(other, 1) as theirs, in_use(model, 1) as mine:
            assert theirs is not mine
        epsilon(other)
        assert torch.equal(*both(other))


def test_without_the_stamp_the_old_answer_goes_on(model, monkeypatch):
    """The tests above see what they claim to see."""
    both(model)
    monkeypatch.setattr(prepared, "_change", lambda *_: "")
    epsilon(model)
    assert not torch.equal(*both(model))
