"""Every family: dense as eager, exits as a plain-Python early-exit loop."""

from dataclasses import replace

import pytest
import torch
from models import FAMILIES, VOCABULARY, random_artifact, tiny_model

from eepass.config import ExitConfig
from eepass.model import transform
from eepass.ops import exits as exit_ops
from eepass.planning import exit_tensors

PROMPT = [7, 30, 99, 12, 55, 140, 8, 23, 61, 77, 101, 4]
STEPS = 24


def eager_hidden_states(model, ids):
    """Hidden states after each layer at the last position: the model eager, without a cache."""
    layers = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 4)
    kept, hooks = [], []
    for layer in layers:
        hooks.append(
            layer.register_forward_hook(
                lambda module, args, out: kept.append(out if torch.is_tensor(out) else out[0])
            )
        )
    logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
    for hook in hooks:
        hook.remove()
    return [hidden[:, -1:] for hidden in kept], logits


def plain_loop(model, transformed, first, count):
    """Early exit as one would write it down: no cache, no graph, no compiled code."""
    plan, head = transformed.plan, transformed.splits[1].head
    tensors = exit_tensors(
        "default", transformed.artifact, transformed.decoder.tensors, transformed.splits[1]
    )
    every = {**transformed.decoder.tensors, **tensors}

    def normed(layer, hidden):
        if f"translator.{layer}.down" in tensors:
            parts = [tensors[f"translator.{layer}.{n}"] for n in ("scale", "down", "up")]
            hidden = exit_ops.translate(hidden[0], *parts)[None]
        return head.norm.graph(
            *(hidden if r.kind == "hidden" else every[r.name] for r in head.norm.inputs)
        )[0]

    ids, steps, hot = [*PROMPT, first], [], tensors["hot.ids"]
    pending, depth = 0, plan.num_layers
    for _ in range(count):
        hidden_states, logits = eager_hidden_states(model, ids)
        previous, step = torch.zeros(1, plan.draft_tokens), None
        for layer, hidden in enumerate(hidden_states, 1):
            if layer == plan.draft_layer:
                ranked = normed(layer, hidden).float() @ tensors["hot.head"].float().T
                draft = hot[ranked.topk(plan.draft_tokens, -1).indices]
            point = plan.at(layer)
            # with the largest bucket full of waiting tokens, this one goes deep
            if point is None or (pending == 7 and layer < depth):
                continue
            z = normed(layer, hidden)
            seen = exit_ops.draft_logits(z, every[head.weight], None, draft)
            mlp = [tensors[f"predictor.{layer}.{n}"] for n in ("w1", "b1", "w2", "b2")]
            probability, previous = exit_ops.predict_exit(seen, previous, *mlp)
            answer = hot[(z.float() @ tensors["hot.head"].float().T).argmax(-1)]
            if probability > point.threshold and answer in draft:
                step = (int(answer), layer)
                break
        step = step or (int(logits.argmax()), depth)
        pending = pending + 1 if step[1] < depth else 0
        steps.append(step)
        ids.append(step[0])
    return steps


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family(family):
    model = tiny_model(family)
    transformed = transform(model, random_artifact(model), max_length=64)
    ids = torch.tensor([PROMPT])

    eager = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=STEPS, do_sample=False,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    dense = [step.token for step in transformed.dense.generate(PROMPT, STEPS)]
    assert dense == eager[0, len(PROMPT) :].tolist()

    # whatever is drafted and whoever leaves early, the exact answer is the dense one
    exact = transformed.configure(ExitConfig(adaptive=False))
    assert [step.token for step in exact.generate(PROMPT, STEPS)] == dense
    assert exact.statistics.passes > 0

    engine = transformed.configure(replace(ExitConfig().approximate(), schedule=False))
    found = list(engine.generate(PROMPT, STEPS))
    expected = plain_loop(model, transformed, found[0].token, STEPS - 1)
    assert [tuple(step) for step in found[1:]] == expected
    assert len({layer for _, layer in expected}) > 1 and max(dense) < VOCABULARY
