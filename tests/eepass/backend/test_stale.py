"""A model compiled by the backend whose behaviour changes otherwise than through its weights."""

import logging

import pytest
import torch
from caller import IDS, Seen, cache_for, compiled, decode, prefill
from models import random_artifact, tiny_model
from torch import nn

from eepass.errors import InputError
from eepass.torch_compile import early_exit_step


@pytest.fixture(autouse=True)
def fresh_graphs():
    torch._dynamo.reset()


class Adapter(nn.Module):
    """Switched and rescaled as PEFT's are."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.scaling, self.active, self.off = inner, {"one": 1.0}, ["one"], False
        torch.manual_seed(1)
        self.added = nn.ModuleDict({"one": nn.Linear(inner.in_features, inner.out_features)})
        self.eval().requires_grad_(False)

    def forward(self, x):
        found = self.inner(x)
        for name in () if self.off else self.active:
            found = found + self.added[name](x) * self.scaling[name]
        return found


class Subject:
    """A tiny model with an adapter, and the same compiled; exits are never taken."""

    def __init__(self, folder, adapted=True):
        self.model = tiny_model("llama", num_hidden_layers=2)
        self.mlp = self.model.model.layers[1].mlp
        if adapted:
            self.mlp.up_proj = Adapter(self.mlp.up_proj)
        random_artifact(self.model).save(folder)
        self.seen = Seen()
        self.step = compiled(self.model, folder, threshold=1.0, stats=self.seen)
        self.caches = cache_for(self.model), cache_for(self.model)

    def logits(self):
        """Of the compiled step and of the model itself, for the same token."""
        for cache in self.caches:
            cache.reset()
        token = [prefill(self.model, cache, IDS).argmax(-1, keepdim=True) for cache in self.caches]
        ours, theirs = self.caches
        return (
            decode(self.step, ours, token[0], 6),
            decode(self.model, theirs, token[1], 6),
        )

    def same(self):
        ours, theirs = self.logits()
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
        return theirs


@pytest.fixture
def subject(tmp_path):
    return Subject(tmp_path / "a")


def adapter_off(subject):
    subject.mlp.up_proj.off = True


def adapter_rescaled(subject):
    subject.mlp.up_proj.scaling["one"] = -3.0


def adapter_switched(subject):
    subject.mlp.up_proj.active.clear()


def adapter_merged(subject):
    adapter = subject.mlp.up_proj
    adapter.inner.weight.add_(adapter.added["one"].weight)
    adapter.inner.bias = adapter.added["one"].bias
    adapter.off = True


def inv_freq(subject):
    subject.model.model.rotary_emb.inv_freq.mul_(0.01)


def epsilon(subject):
    subject.model.model.layers[1].post_attention_layernorm.variance_epsilon = 30.0


def scaling(subject):
    subject.model.model.layers[0].self_attn.scaling = 5.0


def another_forward(subject):
    mlp = subject.mlp
    mlp.forward = lambda x: -type(mlp).forward(mlp, x)


SEEN_BY_DYNAMO = (
    adapter_off, adapter_rescaled, adapter_switched, inv_freq, epsilon, scaling, another_forward,
)  # fmt: skip


@pytest.mark.parametrize("change", SEEN_BY_DYNAMO, ids=lambda change: change.__name__)
def test_a_change_that_dynamo_sees_is_traced_anew(subject, change):
    before = subject.same()
    assert subject.seen.layers, "no exits, nothing tested"
    change(subject)
    after = subject.same()
    assert not torch.allclose(before, after, atol=1e-3), "the change changes nothing"


def test_an_answer_without_exits_says_so(subject, caplog):
    subject.same()
    epsilon(subject)
    with caplog.at_level(logging.WARNING, "eepass"):
        subject.same()
    assert "decodes dense: it computes with a number" in caplog.text


def forward_hook(subject):
    return subject.mlp.register_forward_hook(lambda module, given, made: -made).remove


def pre_hook(subject):
    return subject.mlp.register_forward_pre_hook(lambda module, given: (-given[0],)).remove


def global_hook(subject):
    def negate(module, given, made):
        return -made if module is subject.mlp else None

    return nn.modules.module.register_module_forward_hook(negate).remove


def another_method(subject):
    kind = type(subject.mlp)
    before = kind.forward
    kind.forward = lambda self, x: -before(self, x)
    return lambda: setattr(kind, "forward", before)


UNSEEN = {
    forward_hook: r"model\.layers\.1\.mlp\._forward_hooks",
    pre_hook: r"model\.layers\.1\.mlp\._forward_pre_hooks",
    global_hook: r"torch_forward_hooks",
    another_method: r"LlamaMLP\.forward",
}


@pytest.mark.parametrize("change", UNSEEN, ids=lambda change: change.__name__)
def test_a_change_that_dynamo_does_not_see_is_refused_by_name(subject, change):
    before = subject.same()
    undo = change(subject)
    try:
        with pytest.raises(InputError, match=UNSEEN[change] + ".* has changed since .*reset"):
            subject.logits()
        torch._dynamo.reset()
        assert not torch.allclose(subject.same(), before, atol=1e-3)
    finally:
        undo()
    torch._dynamo.reset()
    torch.testing.assert_close(subject.same(), before)


def test_a_hook_that_is_taken_away_again_changes_nothing(subject):
    before = subject.same()
    forward_hook(subject)()
    torch.testing.assert_close(subject.same(), before)


def test_hooks_of_transformers_are_of_no_account(subject):
    before = subject.same()
    subject.model(IDS, output_hidden_states=True, use_cache=False)
    torch.testing.assert_close(subject.same(), before)


def test_without_the_stamp_the_old_answer_goes_on(subject, monkeypatch):
    """The tests above see what they claim to see."""
    subject.same()
    monkeypatch.setattr(early_exit_step.CodeStamp, "change", lambda self: "")
    forward_hook(subject)
    ours, theirs = subject.logits()
    assert not torch.allclose(ours, theirs, atol=1e-3)
