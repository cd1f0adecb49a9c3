"""Lowered segments give what the traced ones give, through the operators that make them fast."""

import copy

import pytest
import torch
from models import tiny_model

from eepass.codegen.lower_attention import lower_attention
from eepass.codegen.lower_cpu import CpuCompiler
from eepass.codegen.lower_linear import lower_linear, lower_logits
from eepass.passes.pipeline import split_decoder


def real_inputs(segment, split):
    torch.manual_seed(0)
    examples = segment.examples

    def value_of(role):
        like = examples[role]
        if role.kind == "parameter":
            return split.tensors[role.name].detach()
        if role.kind == "slots":
            return torch.arange(3, 3 + len(like))
        if role.kind in ("keys", "values"):
            return torch.zeros(like.shape, dtype=like.dtype)
        return torch.randn(like.shape).to(like.dtype)

    return segment.arguments(value_of)


def count(graph, target):
    return len(graph.graph.find_nodes(op="call_function", target=target))


@pytest.mark.parametrize("family", ("llama", "gpt2"))
@pytest.mark.parametrize("rows", (1, 4))
def test_a_layer_lowered_and_compiled_equals_the_traced_one(family, rows):
    split, _ = split_decoder(tiny_model(family), rows, 64)
    layer = split.layers[1]
    inputs = real_inputs(layer, split)
    expected_inputs = [x.clone() for x in inputs]
    expected = layer.graph(*expected_inputs)
    compiled = CpuCompiler()(layer.graph, layer.structure, inputs)
    (found,) = compiled(list(inputs))
    assert torch.allclose(found, expected, atol=2e-5)
    # the cache was written through the compiled code as well
    for role, own, other in zip(layer.inputs, inputs, expected_inputs, strict=True):
        if role.kind in ("keys", "values"):
            assert own.abs().sum() > 0
            assert torch.allclose(own, other, atol=1e-5)


def test_linear_layers_of_one_input_become_one_call():
    split, _ = split_decoder(tiny_model("llama"), 1, 64)
    graph = copy.deepcopy(split.layers[0].graph)
    assert lower_linear(graph) == 7
    assert count(graph, torch.ops.eepass.linear_rows.default) == 4
    assert count(graph, torch.ops.aten.linear.default) == 0


def test_attention_reads_grouped_keys_without_a_copy():
    split, _ = split_decoder(tiny_model("llama"), 4, 64)
    graph = copy.deepcopy(split.layers[0].graph)
    assert lower_attention(graph) == 1
    call = graph.graph.find_nodes(op="call_function", target=torch.ops.eepass.attend_rows.default)[
        0
    ]
    assert call.args[1].args[0].meta["val"].shape[1] == 2  # two KV heads, not four


def test_many_rows_stay_matrix_products():
    split, _ = split_decoder(tiny_model("llama"), 72, 128)
    graph = copy.deepcopy(split.layers[0].graph)
    assert lower_linear(graph) == 0
    assert lower_attention(graph) == 0


def test_logits_of_a_head_stay_in_float32():
    split, _ = split_decoder(tiny_model("llama").bfloat16(), 1, 64)
    graph = copy.deepcopy(split.head.whole.graph)
    assert lower_logits(graph) == 1
    hidden = torch.randn(1, 1, 64).bfloat16()
    inputs = split.head.whole.arguments(
        lambda role: hidden if role.kind == "hidden" else split.tensors[role.name].detach()
    )
    (logits,) = CpuCompiler()(split.head.whole.graph, "head", inputs, logits=True)(inputs)
    assert logits.dtype == torch.float32


def test_a_second_start_calls_the_same_bare_code():
    """What another process compiled before is returned without anything wrapped around it."""
    split, _ = split_decoder(tiny_model("llama"), 1, 64)
    inputs = real_inputs(split.layers[1], split)
    codes = [
        CpuCompiler()(split.layers[1].graph, split.layers[1].structure, inputs) for _ in range(2)
    ]
    # inductor's own callable: it clears the list of its inputs
    for code in codes:
        given = list(inputs)
        code(given)
        assert given == []
