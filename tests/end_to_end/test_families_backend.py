"""Greedy decoding through ``torch.compile(backend="specee")`` with exits off, family by family."""

import pytest
import torch
from families.table import FAMILIES, tiny_model
from models import random_artifact
from transformers import CompileConfig

from eepass.torch_compile import backend

# one for each way of masks, caches, positions and heads; all others are slow
QUICK = ("llama", "gemma3", "gpt_oss", "deepseek_v3", "bloom", "cohere", "mixtral", "jamba")
# transformers itself cannot decode it over a static cache
BROKEN = ("falcon, alibi",)
IDS = torch.tensor([[5, 9, 44, 7, 8]])


@pytest.fixture(autouse=True)
def forget():
    torch._dynamo.reset()
    backend.say_once.cache_clear()


@pytest.mark.parametrize(
    "family",
    [
        family if family in QUICK else pytest.param(family, marks=pytest.mark.slow)
        for family, entry in FAMILIES.items()
        if not entry.refused and family not in BROKEN
    ],
)
def test_greedy_through_the_backend_is_the_eager_models(family, tmp_path):
    model, steps = tiny_model(FAMILIES[family]), []
    random_artifact(model).save(tmp_path)
    greedy = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    greedy["cache_implementation"] = "static"
    wanted = model.generate(IDS, disable_compile=True, **greedy)
    options = {
        "artifact": str(tmp_path),
        "threshold": 1.0,
        "inner_backend": "eager",
        "stats": lambda statistics: steps.append(statistics.mean_exit_layer),
    }
    compiled = CompileConfig(backend=backend.specee, mode=None, options=options)
    compiled._compile_all_devices = True
    found = model.generate(IDS, compile_config=compiled, **greedy)
    assert found.tolist() == wanted.tolist()
    # all but those with recurrent states really went layer by layer
    if family in QUICK:
        assert bool(steps) == (family != "jamba")
