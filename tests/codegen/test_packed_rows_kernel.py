"""packed_rows in Triton's interpreter against its reference implementation, in any order of
programs."""

import pytest
import torch
from kernel_cases import DTYPES, Case, same

from eepass.ops import packed as reference
from eepass.ops.packed import INT8, ROW, UNROUNDED
from eepass.ops.packing import OUTPUTS, block_size, form_number, layout_of

# kinds with the inputs that share a scale, 0: all
KINDS = {
    "q4_0": ("q4_0", 0), "q4_1": ("q4_1", 0), "q8_0": ("q8_0", 0), "int4-32": ("u4", 32),
    "int4-128": ("u4", 128), "int8-row": ("u8", 0), "int8-64": ("u8", 64),
}  # fmt: skip
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


@pytest.fixture
def kernel(interpreter):
    from eepass.codegen.kernels.register import run_kernels

    return lambda *arguments: run_kernels("packed_rows", *arguments)


def weight(kind, outputs, inputs, seed=0):
    """Random codes with scales and mins that are small numbers, and their form."""
    form, generator = form_number(*kind), torch.Generator().manual_seed(seed)
    size = block_size(form, inputs)
    _, every, head, codes = layout_of(form, size)
    shape = (-(-outputs // OUTPUTS), inputs // every)
    code = torch.randint(0, 256, (*shape, every // 32 * codes), generator=generator)
    dtype = torch.float16 if kind[0][0] == "q" else torch.float32
    numbers = torch.randn(*shape, head // dtype.itemsize, generator=generator) / 16
    parts = [numbers.to(dtype).view(torch.uint8), code.to(torch.uint8)]
    return torch.cat(parts, -1).flatten(1), form


def rows_case(kind, rows, outputs, inputs, dtype="bf16", activations=INT8):
    case, packed = Case(dtype), [weight(kind, n, inputs, n) for n in (outputs, outputs + 5)]
    return [
        case.random(rows, inputs), [w for w, _ in packed], [form for _, form in packed],
        [outputs, outputs + 5], [case.random(outputs), None], activations,
    ]  # fmt: skip


@kinds
@pytest.mark.parametrize("activations", (INT8, ROW, UNROUNDED), ids=("int8", "row", "unrounded"))
@pytest.mark.parametrize(("rows", "outputs", "inputs"), ((1, 1, 128), (5, 70, 384), (17, 33, 1024)))
def test_as_defined(kernel, kind, activations, rows, outputs, inputs):
    arguments = rows_case(kind, rows, outputs, inputs, activations=activations)
    same(kernel(*arguments), reference.packed_rows(*arguments), torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_other_dtypes_and_logits_in_float32(interpreter, kernel, dtype):
    from eepass.codegen.kernels.register import run_kernels

    arguments = rows_case(KINDS["q4_1"], 3, 40, 256, dtype, UNROUNDED)
    same(kernel(*arguments), reference.packed_rows(*arguments))
    x, packed, forms, outputs, biases, _ = arguments
    one = (x, packed[0], forms[0], outputs[0], biases[0], INT8)
    found = run_kernels("packed_logits", *one)
    assert found.dtype == torch.float32
    same([found], [reference.packed_logits(*one)])


@kinds
def test_a_row_has_the_same_bits_among_any_number_of_rows(kernel, kind):
    x, *weights = rows_case(kind, 40, 40, 1152)
    whole = kernel(x, *weights)
    for begin, end in ((0, 1), (39, 40), (3, 19), (7, 40)):
        for part, every in zip(kernel(x[begin:end], *weights), whole, strict=True):
            assert torch.equal(part, every[begin:end])


def test_the_order_in_which_programs_run_does_not_show(kernel, any_order):
    arguments = rows_case(KINDS["int4-32"], 3, 200, 2560)
    expected, orders = kernel(*arguments), any_order()
    for _ in range(4):
        for found, wanted in zip(kernel(*arguments), expected, strict=True):
            assert torch.equal(found, wanted)
    assert len(orders) == 8


def test_a_zero_row_stays_zero(kernel):
    arguments = rows_case(KINDS["q4_0"], 2, 20, 64)
    arguments[0][1] = 0
    assert not kernel(*arguments)[1][1].any()


def test_other_kinds_and_many_rows_go_through_the_reference(interpreter, monkeypatch):
    from eepass.codegen.kernels import packed_rows, register

    packed, form = weight(("u4", 32), 20, 64)
    bits = torch.zeros(2, block_size(form_number("q6_k"), 256), dtype=torch.uint8)
    given = [(torch.randn(2, 256), bits, form_number("q6_k"), 20, None, UNROUNDED)]
    given += [(torch.randn(packed_rows.MOST_ROWS + 1, 64), packed, form, 20, None, UNROUNDED)]
    for arguments in given:
        assert not packed_rows.fits(arguments[2], len(arguments[0]))
        found = register._run_packed("packed_logits", *arguments)
        assert torch.equal(found, reference.packed_logits(*arguments))
        with pytest.raises(ValueError, match="the kernel takes neither"):
            register.run_kernels("packed_logits", *arguments)
    monkeypatch.setattr(register, "run", lambda *_: pytest.fail("through the kernel"))
    with pytest.raises(pytest.fail.Exception, match="through the kernel"):
        register._run_packed("packed_logits", torch.randn(2, 64), packed, form, 20, None, INT8)
