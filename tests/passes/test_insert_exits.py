"""The exit graph runs, and says what the runtime says."""

from dataclasses import replace

import pytest
import torch
from models import random_artifact

from eepass.config import ExitConfig
from eepass.inspecting import exit_graph_of
from eepass.masks import causal_mask
from eepass.planning import exit_tensors

PROMPT = list(range(5, 17))
STEPS = 16


def graph_steps(model, segment, sequence, run):
    """Decode with the exit graph itself over the runtime's cache."""
    cache, split, plan = model.decoder.kv, model.splits[1], model.plan
    tensors = exit_tensors("default", model.artifact, model.decoder.tensors, split)
    tensors = {**model.decoder.tensors, **tensors}
    thresholds, active = torch.full((plan.num_layers + 1,), 2.0), torch.zeros(5, dtype=torch.bool)
    for point in plan.exits:
        thresholds[point.layer] = point.threshold
    token, position, steps = sequence.tokens[-1], sequence.position, []
    for _ in range(STEPS):
        active[:] = False
        active[sorted(sequence.schedule.active())] = True
        values = {
            "ids": torch.tensor([[token]]),
            "positions": torch.tensor([[position]]),
            "active": active,
            "threshold": thresholds,
            "draft": torch.zeros(1, plan.draft_tokens, dtype=torch.long),
        }
        inputs = []
        for role in segment.inputs:
            if role.kind == "keys":
                inputs.append(cache.keys[role.layer])
            elif role.kind == "values":
                inputs.append(cache.values[role.layer])
            elif role.kind == "slots":
                inputs.append(torch.tensor([position]))
            elif role.kind == "mask":
                window = split.windows[role.name]
                inputs.append(causal_mask(1, cache.slots, window, torch.float32, start=position))
            else:
                inputs.append(values[role.name] if role.name in values else tensors[role.name])
        out, exit_layer, hidden = run(*inputs)
        token, position = int(out), position + 1
        assert hidden.shape == (1, 1, 64)
        sequence.schedule.record(int(exit_layer))
        steps.append((token, int(exit_layer)))
    return steps


@pytest.mark.parametrize("how", ("called", "interpreted"))
def test_the_exit_graph_says_what_the_runtime_says(transformed, how):
    engine = transformed.configure(replace(ExitConfig().approximate(), kv="propagate"))
    sequence = engine.start(PROMPT)
    for _ in range(STEPS):
        engine.step()
    expected = sequence.decoded(len(PROMPT) + 1, len(sequence.tokens))
    assert len({step.exit_layer for step in expected}) > 1
    engine.reset()
    segment = exit_graph_of(transformed)
    sequence = engine.start(PROMPT)
    run = segment.graph if how == "called" else torch.fx.Interpreter(segment.graph).run
    assert graph_steps(transformed, segment, sequence, run) == expected
    engine.reset()


def test_the_chain_is_flat_and_predictors_are_inside(transformed):
    transformed.configure(ExitConfig())
    segment = exit_graph_of(transformed)
    cond = torch.ops.higher_order.cond
    predict = torch.ops.eepass.predict_exit.default
    nodes = segment.graph.graph.nodes
    assert sum(node.target is cond for node in nodes) == 5  # four layers and the head
    assert not any(node.target is predict for node in nodes)
    branches = dict(segment.graph.named_children())
    inside = [
        name
        for name, branch in branches.items()
        if any(node.target is predict for node in branch.graph.nodes)
    ]
    assert inside
    for branch in branches.values():
        assert not any(node.target is cond for node in branch.graph.nodes)
    # four layers: one before the exits, then with an exit, and with one after the last layer
    assert len([name for name in branches if name.startswith("layer_")]) <= 3


def test_an_exit_graph_for_every_kv_policy(transformed):
    for policy in ("defer", "propagate", "drop"):
        transformed.configure(replace(ExitConfig().approximate(), kv=policy))
        skip = exit_graph_of(transformed).graph.pass_1
        writes = [n for n in skip.graph.nodes if n.target is torch.ops.aten.index_copy_.default]
        assert len(writes) == (2 if policy == "propagate" else 0)


def test_the_random_artefact_leaves_at_random(llama):
    assert len(random_artifact(llama).presets["default"].calibrations[0].thresholds) == 3
