"""The exit graph gives the tokens and exit layers of the runtime, however it is run."""

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
        slots = torch.tensor([position])
        inputs = []
        for role in segment.inputs:
            if role.kind in ("keys", "values"):
                inputs.append(getattr(cache, role.kind)[role.layer])
            elif role.kind == "slots":
                inputs.append(slots)
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


def exported(segment, folder):
    """The exit graph as ``torch.export`` saves and loads it."""
    program = torch.export.export(segment.graph, tuple(segment.examples.values()), strict=False)
    program._example_inputs = None
    torch.export.save(program, folder / "exit_graph.pt2")
    return torch.export.load(folder / "exit_graph.pt2").module()


@pytest.mark.parametrize("how", ("called", "interpreted", "exported"))
def test_the_exit_graph_gives_what_the_runtime_gives(transformed, how, tmp_path):
    engine = transformed.configure(replace(ExitConfig().approximate(), kv="propagate"))
    sequence = engine.start(PROMPT)
    for _ in range(STEPS):
        engine.step()
    expected = sequence.decoded(len(PROMPT) + 1, len(sequence.tokens))
    assert len({step.exit_layer for step in expected}) > 1
    engine.reset()
    segment = exit_graph_of(transformed)
    sequence = engine.start(PROMPT)
    run = {
        "called": lambda: segment.graph,
        "interpreted": lambda: torch.fx.Interpreter(segment.graph).run,
        "exported": lambda: exported(segment, tmp_path),
    }[how]()
    assert graph_steps(transformed, segment, sequence, run) == expected
    engine.reset()


def test_the_chain_is_flat_and_predictors_are_inside(transformed):
    transformed.configure(ExitConfig())
    segment = exit_graph_of(transformed)
    cond = torch.ops.higher_order.cond
    predict = torch.ops.eepass.predict_exit.default
    nodes = segment.graph.graph.nodes
    # four layers, the draft, predictor and verification at each of three exits, the head
    assert sum(node.target is cond for node in nodes) == 4 + 1 + 2 * 3 + 1
    assert not any(node.target is predict for node in nodes)
    branches = dict(segment.graph.named_children())
    inside = [
        name
        for name, branch in branches.items()
        if any(node.target is predict for node in branch.graph.nodes)
    ]
    # with a translator, and without one
    assert inside == ["predict_0", "predict_1"]
    for branch in branches.values():
        assert not any(node.target is cond for node in branch.graph.nodes)
    # layers of one structure are one branch
    assert len([name for name in branches if name.startswith("layer_")]) == 1


def test_an_exit_graph_for_every_kv_policy(transformed):
    for policy in ("defer", "propagate", "drop"):
        transformed.configure(replace(ExitConfig().approximate(), kv=policy))
        writes = {
            name: sum(
                node.target is torch.ops.aten.index_copy_.default for node in branch.graph.nodes
            )
            for name, branch in exit_graph_of(transformed).graph.named_children()
        }
        found = {name: count for name, count in writes.items() if count}
        filled = {"fill_0": 2} if policy == "propagate" else {}
        assert found == {"layer_0": 2, **filled}


def test_the_random_artefact_leaves_at_random(llama):
    assert len(random_artifact(llama).presets["default"].calibrations[0].thresholds) == 3


def test_what_a_token_does_not_need_does_not_run(transformed):
    engine = transformed.configure(replace(ExitConfig().approximate(), kv="propagate"))
    segment = exit_graph_of(transformed)
    ran = []
    for name, branch in segment.graph.named_children():
        branch.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
    steps = graph_steps(transformed, segment, engine.start(PROMPT), segment.graph)
    engine.reset()
    # drafts come from the hidden state after the first layer
    begins = [place - 1 for place, name in enumerate(ran) if name == "draft_0"]
    assert len(begins) == STEPS
    for begin, end, (_, layer) in zip(begins, [*begins[1:], len(ran)], steps, strict=True):
        step = ran[begin:end]
        if layer == 2:
            assert step.count("layer_0") == step.count("fill_0") == 2
            assert step.count("predict_0") == step.count("verify_0") == 1
            assert "head_0" not in step
    assert any(layer == 2 for _, layer in steps)
