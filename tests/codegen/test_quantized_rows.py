"""Kernels over quantised weights: the bits of the plain kernel over the values they stand for."""

import pytest
import torch
from kernel_cases import same_bits
from torch.fx.experimental.proxy_tensor import make_fx

from eepass.codegen.cpu.native import load_kernels
from eepass.codegen.lower_linear import lower_linear, lower_logits
from eepass.ops import exits as exit_ops
from eepass.ops import quantized
from eepass.ops.quantized import dequantize, pack_int4, unpack_int4

eager = torch.ops.eepass


@pytest.fixture(scope="module", autouse=True)
def kernels():
    assert load_kernels() == ""


def weight(form, rows=37, columns=256):
    """(codes, scales, mins) of a random weight."""
    bits, size, dtype, lows = FORMS[form]
    generator = torch.Generator().manual_seed(3)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    high = 256 if bits == 8 else 16
    codes = torch.randint(0, high, (rows, columns), generator=generator)
    codes = (codes - 128).to(torch.int8) if bits == 8 else pack_int4(codes)
    groups = 1 if size is None else columns // size
    scales = (random(rows, groups) / high).to(dtype)
    return codes, scales, random(rows, groups).to(dtype) if lows else None


FORMS = {
    "int8, a scale a row": (8, None, torch.float32, False),
    "Q8_0": (8, 32, torch.float16, False),
    "Q6_K": (8, 16, torch.float32, False),
    "int8 with mins": (8, 64, torch.bfloat16, True),
    "Q4_0": (4, 32, torch.float16, False),
    "Q4_1": (4, 32, torch.float16, True),
    "Q4_K": (4, 32, torch.float32, True),
    "int4, 128 a scale": (4, 128, torch.bfloat16, False),
    "int4, a scale a row": (4, None, torch.float32, True),
}
forms = pytest.mark.parametrize("form", FORMS)


@forms
@pytest.mark.parametrize("rows", (1, 2, 3, 8, 15, 64))
def test_the_bits_of_the_values(form, rows):
    torch.manual_seed(0)
    x = torch.randn(rows, 256).bfloat16()
    made, bias = weight(form), torch.randn(37).bfloat16()
    values = dequantize(*made, torch.bfloat16)
    codes, scales, mins = ([part, part] for part in made)
    found = eager.quantized_rows(x, codes, scales, mins, [bias, None], False)
    expected = eager.linear_rows(x, [values, values], [bias, None])
    for a, b in zip(found, expected, strict=True):
        same_bits(a, b)
    logits = eager.quantized_logits(x, *made, None, False)
    assert logits.dtype == torch.float32
    same_bits(logits, eager.logits_rows(x, values, None))


def test_weights_of_several_forms_go_together():
    x = torch.randn(3, 256).bfloat16()
    made = [weight(form) for form in FORMS]
    parts = [list(part) for part in zip(*made, strict=True)]
    found = eager.quantized_rows(x, *parts, [None] * len(made), False)
    for one, given in zip(found, made, strict=True):
        assert torch.equal(one, eager.quantized_rows(x, *([p] for p in given), [None], False)[0])


@pytest.mark.parametrize("dynamic", (False, True), ids=("weights", "dynamic"))
def test_a_row_has_the_same_bits_alone_and_with_others(dynamic):
    torch.manual_seed(0)
    x = torch.randn(64, 256).bfloat16()
    for form in ("int8, a scale a row",) if dynamic else FORMS:
        parts = [[part] for part in weight(form)]

        def run(rows, parts=parts):
            return eager.quantized_rows(rows, *parts, [None], dynamic)[0]

        alone = torch.cat([run(row[None]) for row in x])
        for rows in (2, 4, 7, 8, 16, 64):
            same_bits(run(x[:rows]), alone[:rows])


@pytest.mark.parametrize("rows", (1, 5, 8))
def test_inputs_rounded_to_integers(rows):
    torch.manual_seed(0)
    x = torch.randn(rows, 256).bfloat16()
    x[0, 3] = 60.0
    codes, scales, _ = weight("int8, a scale a row")
    bias = torch.randn(37)
    found = eager.quantized_logits(x, codes, scales, None, bias, True)
    expected = quantized.dynamic_logits(x, codes, scales, bias)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    # and it is not what unrounded inputs give
    assert (found - eager.quantized_logits(x, codes, scales, None, bias, False)).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("fp32", "bf16"))
def test_sizes_no_kernel_takes(dtype):
    """Float32 inputs, odd sizes, groups of 24: by the values, and still each row by itself."""
    x = torch.randn(3, 72).to(dtype)
    codes = torch.randint(-128, 128, (5, 72)).to(torch.int8)
    scales = torch.rand(5, 3)
    values = dequantize(codes, scales, None, dtype)
    found = eager.quantized_rows(x, [codes], [scales], [None], [None], False)[0]
    same_bits(found, eager.linear_rows(x, [values], [None])[0])


def test_what_is_packed_is_unpacked():
    codes = torch.randint(0, 16, (3, 128)).to(torch.uint8)
    assert torch.equal(unpack_int4(pack_int4(codes)), codes)
    # by hand: without mins, 8 is zero
    values = dequantize(pack_int4(codes), torch.full((3, 4), 0.5), None, torch.float32)
    assert torch.equal(values, (codes.float() - 8) * 0.5)


@forms
def test_only_the_rows_drafted_are_read(form):
    codes, scales, mins = weight(form)
    z, ids = torch.randn(2, 256).bfloat16(), torch.tensor([[3, 30], [3, 7]])
    values = dequantize(codes, scales, mins, torch.bfloat16)
    expected = exit_ops.draft_logits(z, values, None, ids)
    others = torch.ones(37, dtype=torch.bool)
    others[ids.flatten()] = False
    scales[others] = float("nan")
    found = eager.quantized_draft_logits(z, codes, scales, mins, None, ids)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


def _graph(rows):
    q, v = weight("Q4_1"), weight("Q8_0")

    def layers(x, *parts):
        first = eager.quantized_linear(x, *parts[:3], None, False)
        return first, eager.quantized_linear(x, *parts[3:], None, None, False)

    examples = [torch.randn(1, rows, 256).bfloat16(), *q, *v[:2]]
    return make_fx(layers, tracing_mode="fake", pre_dispatch=True)(*examples), examples


def test_lowering():
    graph, examples = _graph(4)
    expected = graph(*examples)
    assert lower_linear(graph) == 2
    graph.graph.eliminate_dead_code()
    graph.recompile()
    calls = graph.graph.find_nodes(op="call_function", target=eager.quantized_rows.default)
    assert len(calls) == 1
    for found, wanted in zip(graph(*examples), expected, strict=True):
        assert found.shape == wanted.shape
        torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-1)


def test_many_rows_stay_products_of_matrices_and_heads_keep_their_sums():
    many, _ = _graph(65)
    assert lower_linear(many) == 0
    graph, examples = _graph(2)
    assert lower_logits(graph) == 2
    graph.recompile()
    assert all(logits.dtype == torch.float32 for logits in graph(*examples))
