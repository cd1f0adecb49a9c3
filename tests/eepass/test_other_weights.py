"""A model with an adapter: thresholds are refused, drafts are taken where they are asked for."""

from dataclasses import replace

import pytest
import torch
from command_line import refused
from models import AsTraced, random_artifact, tiny_model
from word_model import save_word_model

import eepass
from eepass.config import ExitConfig
from eepass.errors import InputError
from eepass.model import transform

peft = pytest.importorskip("peft", reason="the extra 'dev' is not installed")

PROMPT = [5, 6, 7, 8, 9, 10, 11, 5, 6, 7]


@pytest.fixture(autouse=True)
def as_traced(monkeypatch):
    monkeypatch.setattr("eepass.early_exit_model._cpu_compiler", AsTraced)
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def base():
    return tiny_model("llama")


def with_adapter(base):
    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=4, lora_alpha=16, target_modules=["q_proj", "down_proj"], init_lora_weights=False
    )
    return peft.get_peft_model(base, config).eval()


def answer(made, dense=False):
    engine = made.dense if dense else made.engine
    return [token for token, _ in engine.generate(PROMPT, 16, frozenset())]


@pytest.mark.parametrize("merged", (False, True), ids=("attached", "merged"))
def test_thresholds_are_refused_and_drafts_are_taken(base, merged):
    artifact = random_artifact(base)
    plain = answer(transform(base, artifact, max_length=64), dense=True)
    adapted = with_adapter(base)
    model = adapted.merge_and_unload() if merged else adapted
    with pytest.raises(InputError, match=r"weights is .* thresholds .* run eepass train, or "
                       r"calibrate; .*--drafts-alone or eepass.drafts_alone"):  # fmt: skip
        transform(model, artifact, max_length=64)
    # which asks for a head
    config = ExitConfig(exits=False, speculate="eagle", adaptive=False)
    made = transform(model, eepass.drafts_alone(artifact), config, max_length=64)
    said = answer(made)
    assert said == answer(made, dense=True) != plain
    assert not made.has_exits


def test_drafts_are_taken_of_the_same_shape_alone(base):
    artifact = eepass.drafts_alone(random_artifact(base))
    with pytest.raises(InputError, match=r"hidden is .* run eepass train$"):
        transform(tiny_model("llama", hidden_size=32), artifact, max_length=64)
    tensors = {n: t for n, t in artifact.tensors.items() if not n.startswith("eagle.")}
    with pytest.raises(InputError, match="no draft head"):
        eepass.drafts_alone(replace(artifact, tensors=tensors))


def test_an_adapter_of_the_prompt_is_refused(base):
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with pytest.raises(InputError, match=r"adds to the prompt.*\(LoRA\) are followed"):
        transform(peft.get_peft_model(base, config).eval(), None, max_length=64)


def test_the_command_line_says_what_to_do(base, tmp_path):
    with_adapter(base).save_pretrained(tmp_path / "adapter")
    said = refused("generate", tmp_path / "adapter", "--prompt", "w5")
    assert "an adapter of PEFT, no model" in said and "merge_and_unload()" in said
    model = save_word_model(tmp_path / "model", artifact=False)
    said = refused("generate", model, "--prompt", "w5", "--drafts-alone")
    assert said == "error: --drafts-alone: give --artifact DIR, whose draft head is taken"
