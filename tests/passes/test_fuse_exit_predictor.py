"""Heads of several families read as data; the fused exit point gives what the segments give."""

import copy
import functools
from dataclasses import replace

import pytest
import torch
import transformers
from models import SIZES, VOCABULARY

from eepass.errors import PassError
from eepass.kernel_forms import Channels
from eepass.passes.exits.fuse_exit_predictor import fuse_exit_predictor
from eepass.passes.exits.insert_predictors import insert_predictors
from eepass.passes.exits.read_head_chain import read_head_chain
from eepass.passes.exits.read_kv_fill import read_kv_fill
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


# layers that make keys and values in other ways
GPTJ = {**GPT2, "rotary_dim": 8}
FALCON = {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2}
FALCON |= {"num_attention_heads": 4, "ffn_hidden_size": 96}
NO_HEAD_DIM = {name: size for name, size in TWO.items() if name != "head_dim"}
KV_FAMILIES = {
    "glm": ("GlmForCausalLM", {**TWO, "attention_bias": True}),
    "gptj": ("GPTJForCausalLM", GPTJ),
    "falcon": ("FalconForCausalLM", FALCON),
    "gpt_neox": ("GPTNeoXForCausalLM", {**TWO, "rotary_pct": 0.5}),
    "qwen3": ("Qwen3ForCausalLM", TWO),
    "persimmon": ("PersimmonForCausalLM", NO_HEAD_DIM),
}
REFUSED = {
    "olmo2": ("Olmo2ForCausalLM", TWO),
    "falcon, new": ("FalconForCausalLM", {**FALCON, "new_decoder_architecture": True,
                                          "num_kv_heads": 2}),
}  # fmt: skip
KV_SIZES = {
    "gpt2": (4, 16, 0, False), "cohere": (2, 16, 16, True), "phi": (2, 16, 8, False),
    "glm": (2, 16, 8, True), "gptj": (4, 16, 8, True), "falcon": (1, 16, 16, False),
    "gpt_neox": (4, 16, 8, False), "persimmon": (4, 16, 8, False),
}  # fmt: skip
BY_HEAD = Channels(16, 48, 1), Channels(32, 48, 1)
KV_CHANNELS = {
    "gpt2": (Channels(64, 16, 1), Channels(128, 16, 1)),
    "falcon": (Channels(64, 16, 1), Channels(80, 16, 1)),
    "gpt_neox": BY_HEAD,
    "persimmon": BY_HEAD,
}
families = pytest.mark.parametrize("family", FAMILIES)


@functools.cache
def decoder(family):
    """The split decoder of a family, norms and biases not at their defaults."""
    name, sizes = {**FAMILIES, **KV_FAMILIES, **REFUSED}[family][:2]
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


def layer_of(family):
    """What a family's second layer writes, and the decoder's tensors."""
    split = decoder(family)
    return split.kv_fills[1], split.tensors


@pytest.mark.parametrize("family", (*FAMILIES, *KV_FAMILIES))
def test_how_keys_and_values_are_made_is_read_and_tried(family):
    form = read_kv_fill(*layer_of(family))
    sizes = (form.groups, form.channels, form.rotary, form.interleaved)
    assert sizes == KV_SIZES.get(family, (2, 16, 16, False))
    assert (form.key_channels, form.value_channels) == KV_CHANNELS.get(
        family, (Channels(0, 16, 1), Channels(0, 16, 1))
    )
    if family in FAMILIES:
        assert (form.norm, form.eps, form.weight_offset) == FAMILIES[family][2][:3]
    assert form.transposed == (family == "gpt2")
    assert bool(form.key_bias) == (family in ("phi", "gpt2", "glm", "gpt_neox", "persimmon"))
    assert form.head_form == {"qwen3": "rms", "persimmon": "layer"}.get(family, "none")


@pytest.mark.parametrize("family", ("llama", "cohere", *KV_FAMILIES, "gpt2"))
def test_the_kernel_writes_what_the_layer_does(family, interpreter):
    """Keys and values of three hidden states at slots of their own, beside the eager layer's."""
    from eepass.codegen.kernels.register import run_kernels

    fill, tensors = layer_of(family)
    form = read_kv_fill(fill, tensors)
    shape = (form.groups, 64, form.channels)
    torch.manual_seed(3)
    rows, slots = torch.randn(3, decoder(family).hidden_size), torch.tensor([5, 0, 63])
    sides = {name: torch.randn(3, form.rotary) for name in (form.cos, form.sin) if name}
    expected = {"keys": torch.zeros(1, *shape), "values": torch.zeros(1, *shape)}
    for row in range(3):
        given = {"hidden": rows[None, row : row + 1], "slots": slots[row : row + 1], **expected}

        def value_of(role, row=row, given=given):
            if role.kind == "side":
                return sides[role.name][row].view(fill.examples[role].shape)
            return tensors[role.name] if role.kind == "parameter" else given[role.kind]

        fill.run(value_of)
    found = {kind: [torch.zeros(shape)] for kind in expected}

    def each(name):
        return [tensors[name]] if name else []

    def projected(weight, bias, of):
        biases = [form.bias(tensors[bias], of)] if bias else []
        return [form.projection(tensors[weight], of)], biases

    run_kernels(
        "fill_kv", rows, each(form.norm_weight), each(form.norm_bias),
        *projected(form.key_weight, form.key_bias, form.key_channels),
        *projected(form.value_weight, form.value_bias, form.value_channels),
        each(form.head_norm), each(form.head_bias), found["keys"], found["values"],
        sides.get(form.cos), sides.get(form.sin), slots, form.norm, form.eps, form.weight_offset,
        form.interleaved, form.head_form,
    )  # fmt: skip
    for kind, (cache,) in found.items():
        torch.testing.assert_close(cache, expected[kind][0], atol=2e-5, rtol=1e-5)
        assert cache[:, slots].ne(0).any(-1).all()


@pytest.mark.parametrize(
    "family, reason",
    (
        ("olmo2", "not what norm, projection and rotary embedding give"),
        ("falcon, new", "are not evenly spaced"),
    ),
)
def test_how_keys_are_made_otherwise_is_said(family, reason):
    with pytest.raises(PassError, match=reason):
        read_kv_fill(*layer_of(family))


def test_keys_that_are_scaled_are_not_taken_for_keys_that_are_not():
    fill, tensors = layer_of("llama")
    graph = copy.deepcopy(fill.graph)
    for write in graph.graph.find_nodes(
        op="call_function", target=torch.ops.aten.index_copy_.default
    ):
        with graph.graph.inserting_before(write):
            keys = graph.graph.call_function(torch.ops.aten.mul.Tensor, (write.args[3], 1.25))
        write.update_arg(3, keys)
        break
    graph.recompile()
    with pytest.raises(PassError, match="not what norm"):
        read_kv_fill(replace(fill, graph=graph), tensors)
