"""What a step does on a CUDA device, as far as it can be tested without one: every launch, on
tensors with a device and without values. Reading a value on the host would raise."""

import copy
from dataclasses import replace

import pytest
import torch
from models import eager_compile, random_artifact
from steps import BUCKETS
from torch._subclasses import FakeTensorMode

from eepass.config import ExitConfig
from eepass.passes.exits.fuse_exit_predictor import fuse_exit_predictor
from eepass.passes.exits.insert_predictors import insert_predictors
from eepass.passes.report import PassReport
from eepass.planning import exit_tensors, make_plan
from eepass.runtime.decoder.decoder import Decoder
from eepass.runtime.decoder.side_inputs import Row
from eepass.runtime.step.build import build_step
from eepass.runtime.step.build_speculative import build_speculative_step
from eepass.runtime.step.data import launches
from eepass.runtime.step.exit_points import ExitPoints, with_thresholds
from eepass.runtime.step.layout import StepOptions
from eepass.runtime.step.tree_shape import TreeShape

# FakeTensors of a CPU build can be on no CUDA device; on this one they have no values either
DEVICE = torch.device("meta")


def on_cuda(segment):
    """A segment whose graph makes its tensors on CUDA."""
    graph = copy.deepcopy(segment.graph)
    for node in graph.graph.nodes:
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": DEVICE}
        node.args = tuple(DEVICE if isinstance(arg, torch.device) else arg for arg in node.args)
    graph.recompile()
    return replace(segment, graph=graph)


def split_on_cuda(split, tensors):
    head = replace(
        split.head,
        whole=on_cuda(split.head.whole),
        norm=split.head.norm and on_cuda(split.head.norm),
    )
    return replace(
        split,
        tensors=tensors,
        embed=on_cuda(split.embed),
        positional=on_cuda(split.positional),
        layers=tuple(map(on_cuda, split.layers)),
        kv_fills=tuple(map(on_cuda, split.kv_fills)),
        head=head,
    )


def moved(tensors):
    return {n: torch.empty(t.shape, dtype=t.dtype, device=DEVICE) for n, t in tensors.items()}


@pytest.fixture(scope="module")
def exit_points(llama, llama_splits):
    """A plan, its tensors, its segments as they are and as kernels, made where there are values."""
    artifact, split = random_artifact(llama), llama_splits[1]
    plan = make_plan(ExitConfig().approximate(), artifact, 4)
    tensors = exit_tensors("default", artifact, split.tensors, split)
    tensors = with_thresholds(tensors, plan)
    every = {**split.tensors, **tensors}
    segments = insert_predictors(split, plan, every, PassReport())
    fused = fuse_exit_predictor(split, plan, every, PassReport())
    return plan, tensors, segments, fused


@pytest.fixture
def device(monkeypatch, exit_points):
    # deterministic mode fills memory that has none
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield mode


@pytest.fixture
def decoder(llama_splits, device):
    tensors = moved(llama_splits[1].tensors)
    return Decoder({n: split_on_cuda(s, tensors) for n, s in llama_splits.items()}, eager_compile)


@pytest.mark.parametrize("fused", (True, False), ids=("kernels", "segments"))
@pytest.mark.parametrize("kv", ("defer", "propagate", "drop"))
def test_no_launch_leaves_the_device_or_waits_for_the_host(decoder, exit_points, kv, fused):
    plan, tensors, segments, kernels = exit_points
    segments = replace(
        segments,
        predictors={n: on_cuda(p) for n, p in segments.predictors.items()},
        **{name: on_cuda(getattr(segments, name)) for name in ("verify", "draft", "normed")},
    )
    exits = ExitPoints(decoder, plan, segments, moved(tensors), kernels if fused else None)
    step = build_step(decoder, exits, StepOptions(kv=kv, buckets=BUCKETS))
    for buffer in step.buffers.values():
        assert buffer.tensor.device == DEVICE, buffer.name
    ran = 0
    for launch in launches(step.items):
        launch.run(step.given(launch))
        ran += 1
    assert ran > 10


@pytest.mark.parametrize("branches", ((7,), (4, 2, 1)), ids=("chain", "tree"))
@pytest.mark.parametrize("draws", (False, True), ids=("greedy", "sampled"))
def test_a_speculative_step_stays_on_the_device(decoder, draws, branches):
    step = build_speculative_step(decoder, TreeShape(branches), (2,), draws)
    for buffer in step.buffers.values():
        assert buffer.tensor.device == DEVICE, buffer.name
    for launch in launches(step.items):
        launch.run(step.given(launch))


def test_a_prompt_runs_on_the_device(decoder):
    rows = [Row(0, at, at) for at in range(11)]
    hidden = decoder.forward(list(range(3, 14)), rows, decoder.capacity)
    assert hidden.device == DEVICE
    assert decoder.logits(hidden[:, -1:]).device == DEVICE
