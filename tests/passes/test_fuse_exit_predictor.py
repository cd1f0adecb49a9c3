"""Heads of several families read as data; the fused exit point gives what the segments give."""

import copy
import functools
from dataclasses import replace

import pytest
import torch
import transformers
from models import SIZES, VOCABULARY

from eepass.errors import PassError
from eepass.passes.exits.fuse_exit_predictor import fuse_exit_predictor
from eepass.passes.exits.insert_predictors import insert_predictors
from eepass.passes.exits.read_head_chain import read_head_chain
from eepass.passes.pipeline import split_decoder
from eepass.passes.report import PassReport
from eepass.plan import ExitPlan, ExitPoint

K = 6
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512}
TWO = {**SIZES, "num_hidden_layers": 2}
FAMILIES = {
    "llama": ("LlamaForCausalLM", TWO, ("rms", 1e-6, 0.0, 1.0, 0.0)),
    "gemma2": (
        "Gemma2ForCausalLM",
        {**TWO, "query_pre_attn_scalar": 16, "sliding_window": 8},
        ("rms", 1e-6, 1.0, 1.0, 30.0),
    ),
    "cohere": ("CohereForCausalLM", {**TWO, "logit_scale": 0.25}, ("layer", 1e-5, 0.0, 0.25, 0.0)),
    "granite": (
        "GraniteForCausalLM",
        {**TWO, "logits_scaling": 8.0},
        ("rms", 1e-6, 0.0, 0.125, 0.0),
    ),
    "phi": ("PhiForCausalLM", TWO, ("layer", 1e-5, 0.0, 1.0, 0.0)),
    "gpt2": ("GPT2LMHeadModel", GPT2, ("layer", 1e-5, 0.0, 1.0, 0.0)),
}

families = pytest.mark.parametrize("family", FAMILIES)


@functools.cache
def decoder(family):
    """The split decoder of a family, norms and biases not at their defaults."""
    name, sizes = FAMILIES[family][:2]
    model_class = getattr(transformers, name)
    torch.manual_seed(0)
    with torch.no_grad():
        model = model_class(model_class.config_class(**sizes)).eval().requires_grad_(False)
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
        return split_decoder(model, 1, 64)[0]


def plan_of(split, verify="hot"):
    points = (ExitPoint(1, True, 0.3), ExitPoint(2, False, 0.6))
    return ExitPlan(2, 1, K, points, verify, "defer")


def tensors_of(split, plan):
    torch.manual_seed(1)
    head = split.tensors[split.head.weight].detach()
    hidden = head.shape[1]
    made = {
        "hot.ids": torch.randperm(VOCABULARY)[:50],
        "translator.1.scale": torch.rand(hidden) + 0.5,
        "translator.1.down": torch.randn(5, hidden) * hidden**-0.5,
        "translator.1.up": torch.randn(hidden, 5) * 0.2,
    }
    made["hot.head"] = head[made["hot.ids"]].contiguous()
    if split.head.bias:
        made["hot.bias"] = split.tensors[split.head.bias].detach()[made["hot.ids"]]
    for layer in (1, 2):
        made[f"predictor.{layer}.w1"] = torch.randn(16, 3 * K) * 0.3
        made[f"predictor.{layer}.b1"] = torch.randn(16) * 0.1
        made[f"predictor.{layer}.w2"] = torch.randn(16) * 0.3
        made[f"predictor.{layer}.b2"] = torch.randn(1) * 0.1
    return {**split.tensors, **made, **plan.threshold_tensors()}


def call(segment, tensors, *given):
    values = iter(given)
    return segment.graph(
        *(tensors[r.name] if r.kind == "parameter" else next(values) for r in segment.inputs)
    )


@families
def test_the_head_is_read_as_data(family):
    chain = read_head_chain(decoder(family).head)
    found = (chain.norm, chain.eps, chain.weight_offset, chain.logit_scale, chain.logit_cap)
    assert found == FAMILIES[family][2]
    assert bool(chain.head_bias) == (family == "phi")
    assert bool(chain.norm_bias) == (family in ("gpt2", "phi"))
    assert chain.norm_weight.endswith("norm.weight") or family == "gpt2"


@families
@pytest.mark.parametrize("rows", (1, 3))
def test_a_fused_exit_point_gives_what_the_segments_give(family, rows):
    split = decoder(family)
    plan = plan_of(split)
    tensors = tensors_of(split, plan)
    segments = insert_predictors(split, plan, tensors, PassReport(), rows)
    report = PassReport()
    fused = fuse_exit_predictor(split, plan, tensors, report, rows)
    assert report.rewritten == 5 and not report.skipped
    torch.manual_seed(2)
    hidden = torch.randn(1, rows, split.hidden_size) + 1
    draft, previous = torch.randint(VOCABULARY, (rows, K)), torch.rand(rows, K)
    for point in plan.exits:
        expected = call(segments.predictors[point.layer], tensors, hidden, draft, previous)
        *found, exits = call(fused.predictors[point.layer], tensors, hidden, draft, previous)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, atol=3e-5, rtol=1e-5)
        assert torch.equal(exits, expected[0] > point.threshold)
    z = expected[2]
    best = tensors["hot.ids"][call(segments.verify, tensors, z)[0].argmax(-1)]
    draft[:, 2] = best
    draft[-1] = -1
    for segment, given in ((fused.verify, z), (fused.final, hidden)):
        token, known = call(segment, tensors, given, draft)
        assert torch.equal(token, best)
        assert known.tolist() == [True] * (rows - 1) + [False]
    scores, ids = call(fused.draft, tensors, z)
    logits = call(segments.draft, tensors, z)[0]
    assert torch.equal(ids, tensors["hot.ids"][logits.topk(K, -1).indices])
    torch.testing.assert_close(scores, logits.log_softmax(-1).topk(K, -1).values)


def test_the_graph_holds_one_operator():
    split = decoder("llama")
    plan = plan_of(split, "full")
    fused = fuse_exit_predictor(split, plan, tensors_of(split, plan), PassReport())
    for segment, target in (
        (fused.predictors[1], torch.ops.eepass.exit_predictor.default),
        (fused.verify, torch.ops.eepass.verify_head.default),
    ):
        called = [n.target for n in segment.graph.graph.nodes if n.op == "call_function"]
        ours = [t for t in called if str(t).startswith("eepass.")]
        assert ours == [target]
        assert not {str(t) for t in called} & {"aten.mm.default", "aten.mul.Tensor"}


def test_a_step_that_means_nothing_in_a_head_is_named():
    split = decoder("gemma2")
    graph = split.head.transform.graph
    copied = copy.deepcopy(graph)
    tanh = torch.ops.aten.tanh.default
    for node in copied.graph.find_nodes(op="call_function", target=tanh):
        node.target = torch.ops.aten.sigmoid.default
    copied.recompile()
    head = replace(split.head, transform=replace(split.head.transform, graph=copied))
    with pytest.raises(PassError, match=r"aten\.sigmoid\.default .* is no step of a known head"):
        read_head_chain(head)
    report, plan = PassReport(), plan_of(split)
    other = replace(split, head=head)
    assert fuse_exit_predictor(other, plan, tensors_of(split, plan), report) is None
    assert "sigmoid" in report.skipped[0][1]


def test_a_hot_vocabulary_without_its_bias_is_not_fused():
    split = decoder("phi")
    plan, report = plan_of(split), PassReport()
    tensors = tensors_of(split, plan)
    del tensors["hot.bias"]
    assert fuse_exit_predictor(split, plan, tensors, report) is None
    assert "hot.bias" in report.skipped[0][1]
