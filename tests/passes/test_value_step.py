"""Steps whose cache is a value say what the engine says over its own; in plain PyTorch."""

from dataclasses import replace

import pytest
import torch
from models import eager_compile, random_artifact, tiny_model

from eepass.config import ExitConfig
from eepass.errors import PassError
from eepass.exit_rule import SCHEDULE_RADIUS, SCHEDULE_WINDOW
from eepass.model import ALWAYS_ACTIVE, EarlyExitModel, split_model
from eepass.passes.functional import return_kv_rows
from eepass.passes.functional.value_exits import DecodeStep
from eepass.passes.functional.value_step import Call, PromptStep
from eepass.planning import exit_tensors

PROMPT = [5 + (7 * i) % 120 for i in range(21)]
STEPS = 24


class Eager:
    """Runs a step while it is built; ``ran`` says which functions did."""

    def __init__(self, tensors):
        self.tensors, self.ran = tensors, []

    def weight(self, name):
        return self.tensors[name]

    def constant(self, tensor):
        return tensor

    def call(self, call):
        self.ran.append(call.key if isinstance(call.key, str) else call.key[0])
        return list(call.function(*call.operands))

    def branch(self, condition, then, otherwise):
        case = then if condition else otherwise
        return self.call(case) if isinstance(case, Call) else list(case)


class Stepper:
    """A model's steps over caches of its own."""

    def __init__(self, ready):
        plan, splits = ready.plan, ready.splits
        own = ready.decoder.tensors
        tensors = {**own, **exit_tensors("default", ready.artifact, own, splits[1])}
        segments = ready.segments_for(ready.config, plan, tensors, 1)
        self.build, self.plan = Eager(tensors), plan
        self.prompt = PromptStep(splits[max(splits)], splits[1])
        self.decode = DecodeStep(splits[1], segments, plan, SCHEDULE_RADIUS, ALWAYS_ACTIVE)
        self.caches = self.decode.empty_caches()
        assert self.prompt.caches == self.decode.caches

    def write(self, rows, slot, count):
        for cache, new in zip(self.caches, rows, strict=True):
            cache[:, :, slot : slot + count] = new[:, :, :count]

    def prefill(self, ids):
        size = self.prompt.split.rows
        for start in range(0, len(ids), size):
            chunk = ids[start : start + size]
            padded = torch.tensor([chunk + [0] * (size - len(chunk))])
            token, *rows = self.prompt.build(
                self.build, padded, torch.tensor([start]), torch.tensor([len(chunk) - 1]),
                self.caches,
            )  # fmt: skip
            self.write(rows, start, len(chunk))
        return int(token)

    def says(self, ids, count):
        depth = self.plan.num_layers
        thresholds = torch.full((depth + 1,), 2.0)
        for point in self.plan.exits:
            thresholds[point.layer] = point.threshold
        recent = torch.tensor([0] * (SCHEDULE_WINDOW - 1) + [depth])
        steps = [(self.prefill(ids), depth)]
        for position in range(len(ids), len(ids) + count - 1):
            token, layer, recent, *rows = self.decode.build(
                self.build, torch.tensor([[steps[-1][0]]]), torch.tensor([position]), recent,
                thresholds, self.caches,
            )  # fmt: skip
            self.write(rows, position, 1)
            steps.append((int(token), int(layer)))
        return steps


def engine_says(ready):
    return [tuple(step) for step in ready.engine.generate(PROMPT, STEPS)]


@pytest.fixture(scope="module")
def ready(llama, llama_splits):
    from eepass.passes.report import PassReport

    artifact = random_artifact(llama)
    return EarlyExitModel(llama_splits, PassReport(), frozenset(), artifact, compiler=eager_compile)


def configured(ready, policy):
    ready.configure(replace(ExitConfig().approximate(), kv=policy))
    return ready


@pytest.mark.parametrize("policy", ("propagate", "drop"))
def test_the_step_says_what_the_engine_says(ready, policy):
    expected = engine_says(configured(ready, policy))
    assert len({layer for _, layer in expected[1:]}) > 1
    assert Stepper(ready).says(PROMPT, STEPS) == expected


def test_where_attention_is_not_recognised_the_cache_is_copied(ready, monkeypatch):
    expected = engine_says(configured(ready, "propagate"))
    monkeypatch.setattr(return_kv_rows, "_read_in_place", lambda *arguments: None)
    stepper = Stepper(ready)
    layer = stepper.decode.split.layers[0].graph
    copies = [n for n in layer.graph.nodes if n.target is torch.ops.aten.index_copy.default]
    assert len(copies) == 2
    assert stepper.says(PROMPT, STEPS) == expected


def test_no_layer_copies_the_cache_or_writes_it(ready):
    stepper = Stepper(configured(ready, "propagate"))
    for segment in (*stepper.decode.split.layers, *stepper.prompt.split.layers):
        targets = [node.target for node in segment.graph.graph.nodes]
        assert torch.ops.aten.index_copy_.default not in targets
        assert torch.ops.aten.index_copy.default not in targets
        assert targets.count(return_kv_rows.attend) == 1


def test_what_a_token_does_not_need_does_not_run(ready):
    stepper = Stepper(configured(ready, "propagate"))
    said = stepper.says(PROMPT, STEPS)
    left = next(index for index, (_, layer) in enumerate(said[1:]) if layer == 2)
    # each step begins anew; the prompt's chunks come first
    begins = [i for i, key in enumerate(stepper.build.ran) if key == "begin"]
    chunks = -(-len(PROMPT) // stepper.prompt.split.rows)
    ran = stepper.build.ran[begins[chunks + left] : begins[chunks + left + 1]]
    assert ran.count("layer") == 2 and ran.count("fill") == 2
    assert ran.count("predict") == ran.count("verify") == 1
    assert "head" not in ran


def test_a_mixture_of_experts():
    model = tiny_model("mixtral")
    splits, report = split_model(model, 64, (1,))
    artifact = random_artifact(model)
    ready = EarlyExitModel(splits, report, frozenset(), artifact, compiler=eager_compile)
    expected = engine_says(configured(ready, "propagate"))
    assert Stepper(ready).says(PROMPT, STEPS) == expected


def test_waiting_tokens_and_trained_drafts_are_refused(ready):
    configured(ready, "defer")
    with pytest.raises(PassError, match="propagate or drop"):
        Stepper(ready)
