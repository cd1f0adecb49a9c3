"""Kernels over packed weights: their values, their rounding, and a row's bits in any company."""

import numpy as np
import pytest
import torch
from gguf import dequantize as gguf_values
from gguf import quantize as gguf_blocks
from gguf.constants import GGMLQuantizationType
from kernel_cases import same_bits
from torch.fx.experimental.proxy_tensor import make_fx

from eepass.codegen.cpu.building import KernelsMissing
from eepass.codegen.cpu.native import kernel_isa, load_kernels
from eepass.codegen.lower_linear import lower_linear, lower_logits
from eepass.ops import packed as reference
from eepass.ops import packing
from eepass.ops.packed import INT8, ROW, UNROUNDED
from eepass.ops.packing import GGUF_BLOCKS, form_number, gguf_packed_shape

eager = torch.ops.eepass
SETS = ("avx512", "avxvnni", "avx2")
OUTPUTS, INPUTS = 37, 320
FORMS = {
    **{kind: form_number(kind) for kind in GGUF_BLOCKS},
    **{f"{kind} of {group or 'a row'}": form_number(kind, group)
       for kind in ("u4", "u8") for group in (32, 64, 0)},
}  # fmt: skip
forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


@pytest.fixture(scope="module", autouse=True)
def kernels():
    assert load_kernels() == ""


@pytest.fixture(params=SETS)
def isa(request):
    """Each instruction set that this processor has."""
    try:
        kernel_isa(request.param)
    except KernelsMissing as missing:
        pytest.skip(str(missing))
    yield request.param
    kernel_isa("best")


def packed_gguf(blocks, form, order=None):
    # as memory that was used before, which zeros must be written to
    packed = torch.full(gguf_packed_shape(blocks, form), 255, dtype=torch.uint8)
    eager.pack_gguf(blocks, form, order, packed)
    return packed


def width(form):
    """A number of inputs with a part of a span at the end, where the form allows it."""
    return 512 if packing.KINDS[form % 256] in packing.K_KINDS else INPUTS


def weight(form, outputs=OUTPUTS, seed=0):
    """A packed weight with random codes, and its values as its format defines them."""
    kind, group = packing.KINDS[form % 256], form // 256
    random = np.random.default_rng(seed)
    if kind in GGUF_BLOCKS:
        blocks = random_blocks(kind, outputs, width(form), random)
        values = gguf_values(blocks, GGMLQuantizationType[kind.upper()])
        packed = packed_gguf(torch.from_numpy(blocks), form)
        return packed, torch.from_numpy(values.astype(np.float32))
    codes = random.integers(0, 16 if kind == "u4" else 256, (outputs, width(form)), np.uint8)
    groups = width(form) // group if group else 1
    scales, mins = (random.normal(0, 0.1, (outputs, groups)).astype(np.float32) for _ in range(2))
    parts = [torch.from_numpy(part) for part in (codes, scales, mins)]
    each = [part.repeat_interleave(width(form) // groups, 1).double() for part in parts[1:]]
    return eager.pack_groups(*parts, form), (parts[0] * each[0] + each[1]).float()


def random_blocks(kind, rows, columns, random):
    """Blocks as a file has them: random codes, and finite scales."""
    size = GGUF_BLOCKS[kind]
    count = packing.SPAN if kind in packing.K_KINDS else packing.GROUP
    blocks = random.integers(0, 256, (rows, columns // count, size), np.uint8)
    halves = {"q4_1": (0, 2), "q5_1": (0, 2), "q4_k": (0, 2), "q5_k": (0, 2), "q6_k": (208,)}
    for at in halves.get(kind, (0,)):
        numbers = random.normal(0, 0.01, blocks.shape[:2]).astype(np.float16)
        blocks[..., at : at + 2] = numbers[..., None].view(np.uint8)
    return blocks.reshape(rows, -1)


@forms
def test_values_are_the_formats_own(form):
    packed, values = weight(form)
    found = eager.unpack(packed, form, OUTPUTS, None)
    same_bits(found, values)
    same_bits(packing.unpack(packed, form, OUTPUTS, None), values)
    ids = torch.tensor([36, 0, 5, 5])
    same_bits(eager.unpack(packed, form, OUTPUTS, ids), values[ids])


@forms
def test_rows_that_are_not_rounded(form, isa):
    packed, values = weight(form)
    torch.manual_seed(0)
    x, bias = torch.randn(3, width(form)).bfloat16(), torch.randn(OUTPUTS).bfloat16()
    found = eager.packed_logits(x, packed, form, OUTPUTS, bias, UNROUNDED)
    expected = x.double() @ values.double().T + bias.double()
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-3)


@forms
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("fp32", "bf16"))
@pytest.mark.parametrize("activations", (INT8, ROW), ids=("int8", "row"))
def test_rows_rounded_to_int8(form, dtype, activations, isa):
    packed, _ = weight(form)
    torch.manual_seed(0)
    x = torch.randn(5, width(form)).to(dtype)
    x[0, 3], x[1] = 60.0, 0.0
    expected = reference.packed_logits(x, packed, form, OUTPUTS, None, activations)
    found = eager.packed_logits(x, packed, form, OUTPUTS, None, activations)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
    # and it is not what unrounded rows give
    plain = eager.packed_logits(x, packed, form, OUTPUTS, None, UNROUNDED)
    assert (found - plain).abs().max() > 1e-2


@forms
@pytest.mark.parametrize("rows", (1, 2, 4))
@pytest.mark.parametrize("activations", (INT8, ROW), ids=("int8", "row"))
def test_the_largest_products_are_exact(form, activations, rows, isa):
    packed, _ = weight(form)
    _, every, head, codes = packing.layout_of(form, packed.shape[1])
    packed.view(len(packed), -1, head + every // packing.GROUP * codes)[..., head:] = 255
    # rounded to -128 by the row, to -127 else: of all rows that AVX2 adds in 16 bits the largest
    x = torch.full((rows, width(form)), -1.0)
    expected = reference.packed_logits(x, packed, form, OUTPUTS, None, activations)
    found = eager.packed_logits(x, packed, form, OUTPUTS, None, activations)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


def test_k_types_share_a_scale_among_256_inputs_and_others_among_32():
    """As llama.cpp has it: an outlier costs its own group its precision, no other."""
    torch.manual_seed(0)
    x = torch.randn(1, 512)
    x[0, 3] = 1000.0
    for kind, group in (("q4_k", 256), ("q4_1", 32)):
        form = form_number(kind)
        wrong = (reference.rounded(x, form, INT8) - x).abs()[0]
        assert wrong[4:group].max() > 0.5
        assert wrong[group:].max() < 0.05


@forms
@pytest.mark.parametrize("activations", (INT8, ROW, UNROUNDED), ids=("int8", "row", "none"))
def test_a_row_has_the_same_bits_alone_and_with_others(form, activations, isa):
    packed, _ = weight(form)
    torch.manual_seed(0)
    x = torch.randn(70, width(form)).bfloat16()

    def run(rows):
        return eager.packed_rows(rows, [packed], [form], [OUTPUTS], [None], activations)[0]

    alone = torch.cat([run(row[None]) for row in x])
    for rows in (*range(2, 18), 70):
        same_bits(run(x[:rows]), alone[:rows])
        same_bits(run(x[70 - rows :]), alone[70 - rows :])


def test_instruction_sets_agree():
    """Their dot products are exact; what differs is how a processor adds float sums."""
    form = form_number("q4_k")
    packed, _ = weight(form)
    x = torch.randn(4, 512).bfloat16()
    found = {}
    for name in SETS:
        try:
            kernel_isa(name)
        except KernelsMissing:
            continue
        found[name] = eager.packed_logits(x, packed, form, OUTPUTS, None, INT8)
    kernel_isa("best")
    first, *others = found.values()
    for other in others:
        same_bits(first, other)


def test_weights_of_several_forms_go_together():
    x = torch.randn(3, 512).bfloat16()
    kinds = ("q4_k", "q6_k", "q8_0")
    given = [form_number(kind) for kind in kinds]
    blocks = [random_blocks(kind, 37, 512, np.random.default_rng(0)) for kind in kinds]
    packed = [packed_gguf(torch.from_numpy(b), f) for b, f in zip(blocks, given, strict=True)]
    biases = [torch.randn(37), None, None]
    found = eager.packed_rows(x, packed, given, [37] * 3, biases, INT8)
    for one, *own in zip(found, packed, given, biases, strict=True):
        weight_, form, bias = own
        same_bits(one, eager.packed_rows(x, [weight_], [form], [37], [bias], INT8)[0])


@pytest.mark.parametrize("value", (float("nan"), float("inf")))
@pytest.mark.parametrize("kind", ("q4_k", "q4_1"))
def test_what_is_not_finite_is_not_rounded_away(value, kind, isa):
    form = form_number(kind)
    packed, _ = weight(form)
    x = torch.randn(2, width(form)).bfloat16()
    x[1, 40] = value
    for activations in (INT8, ROW, UNROUNDED):
        logits = eager.packed_logits(x, packed, form, OUTPUTS, None, activations)
        assert logits[0].isfinite().all()
        assert not logits[1].isfinite().any()


def test_rows_of_a_file_in_another_order():
    form = form_number("q4_1")
    blocks = torch.from_numpy(random_blocks("q4_1", 37, 320, np.random.default_rng(0)))
    order = torch.randperm(37)
    packed = packed_gguf(blocks, form, order)
    plain = eager.unpack(packed_gguf(blocks, form), form, 37, None)
    same_bits(eager.unpack(packed, form, 37, None), plain[order])


@forms
def test_some_outputs_alone(form):
    packed, values = weight(form)
    ids = torch.tensor([36, 3, 3, 0, *range(20)])
    chosen = eager.select_outputs(packed, form, ids)
    same_bits(eager.unpack(chosen, form, len(ids), None), values[ids])
    same_bits(chosen, packing.select_outputs(packed, form, ids))


@forms
def test_logits_of_the_draft_tokens(form):
    packed, values = weight(form)
    z, ids = torch.randn(2, width(form)).bfloat16(), torch.tensor([[3, 30], [3, 7]])
    found = eager.packed_draft_logits(z, packed, form, OUTPUTS, None, ids)
    expected = torch.einsum("rh,rkh->rk", z.double(), values.double()[ids]).float()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


def test_packing_in_plain_pytorch():
    """What runs without a compiler gives the same bytes."""
    codes = torch.randint(0, 16, (37, 128)).to(torch.uint8)
    scales, mins = torch.randn(37, 4), torch.randn(37, 4)
    form = form_number("u4", 32)
    same_bits(
        eager.pack_groups(codes, scales, mins, form),
        packing.pack_groups(codes, scales, mins, form),
    )


def test_quantising_with_ggufs_own_rules_and_reading_back():
    values = np.random.default_rng(0).normal(size=(32, 64)).astype(np.float32)
    blocks = gguf_blocks(values, GGMLQuantizationType.Q8_0)
    form = form_number("q8_0")
    found = eager.unpack(packed_gguf(torch.from_numpy(blocks), form), form, 32, None)
    assert (found - torch.from_numpy(values)).abs().max() < 0.05


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a | {"x": torch.randn(2, 352)}, "x has 352 columns"),
        (lambda a: a | {"outputs": 200}, "do not fit"),
        (lambda a: a | {"form": 77}, "unknown"),
        (lambda a: a | {"form": form_number("u4", 24)}, "no groups of 24"),
        (lambda a: a | {"packed": a["packed"][:, :-3]}, "contiguous"),
        (lambda a: a | {"packed": a["packed"][:, :-3].contiguous()}, "does not fit its form"),
        (lambda a: a | {"x": torch.randn(2, 320).half()}, "float32 or bfloat16"),
    ],
)
def test_shapes_are_checked_before_anything_is_read(change, message):
    form = form_number("q4_1")
    packed, _ = weight(form)
    given = {"x": torch.randn(2, 320), "packed": packed, "form": form, "outputs": OUTPUTS}
    with pytest.raises(RuntimeError, match=message):
        eager.packed_logits(*change(given).values(), None, INT8)


def _graph(rows):
    q, v = form_number("q4_1"), form_number("q8_0")
    packed = [weight(form)[0] for form in (q, v)]

    def layers(x, a, b):
        first = eager.packed_linear(x, a, q, OUTPUTS, None, INT8)
        return first, eager.packed_linear(x, b, v, OUTPUTS, None, INT8)

    examples = [torch.randn(1, rows, 320).bfloat16(), *packed]
    return make_fx(layers, tracing_mode="fake", pre_dispatch=True)(*examples), examples


@pytest.mark.parametrize("rows", (1, 100))
def test_lowering(rows):
    graph, examples = _graph(rows)
    expected = graph(*examples)
    assert lower_linear(graph) == 2
    graph.recompile()
    calls = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert calls.count(eager.packed_rows.default) == 1
    for one, other in zip(graph(*examples), expected, strict=True):
        same_bits(one, other)


def test_lowering_logits():
    graph, examples = _graph(2)
    lower_logits(graph)
    graph.recompile()
    assert all(logits.dtype == torch.float32 for logits in graph(*examples))
