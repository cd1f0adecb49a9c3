"""The backend on the real model, with its shipped artefact, through inductor."""

import pytest
import torch
from caller import Seen, cache_for, decode, prefill

from eepass import load
from eepass.torch_compile.backend import specee

NEW = 96


@pytest.mark.slow
def test_smollm2_leaves_early_and_agrees_with_itself():
    loaded = load("smollm2")
    model, seen = loaded.model, Seen()
    torch._dynamo.reset()
    # the artefact is found by the model's fingerprint
    step = torch.compile(model, backend=specee, options={"stats": seen})
    ids = torch.tensor([loaded.encode("Give a step-by-step plan for a beginner in gardening.")])
    length = ids.shape[1] + NEW
    with torch.no_grad():
        given = {"max_new_tokens": NEW, "do_sample": False, "cache_implementation": "static"}
        dense = model.generate(ids, **given)[0, ids.shape[1] :].tolist()
        cache = cache_for(model, length)
        logits = prefill(model, cache, ids)
        agreeing = int(logits.argmax()) == dense[0]
        for place, token in enumerate(dense[:-1]):
            logits = decode(step, cache, torch.tensor([[token]]), ids.shape[1] + place)
            agreeing += int(logits.argmax()) == dense[place + 1]
    assert sum(seen.layers) / len(seen.layers) < 29.5
    assert agreeing / len(dense) > 0.9
