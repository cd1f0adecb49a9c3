"""linear_rows in Triton's interpreter against its reference implementation, in any order of
programs."""

import pytest
import torch
from kernel_cases import Case, same

from eepass.ops.rows import linear_rows

# outputs and inputs: odd ones, and inputs that are divided into 1, 2 and 4 parts
SIZES = ((1, 63), (33, 200), (40, 1100), (7, 2500))


@pytest.fixture
def kernel(interpreter):
    from eepass.codegen.kernels.register import run_kernels

    return lambda *arguments: run_kernels("linear_rows", *arguments)


def rows_case(rows, outputs, inputs, dtype="fp32", biased=True):
    case = Case(dtype)
    weights = [case.random(n, inputs, scale=inputs**-0.5) for n in (outputs, outputs + 5)]
    return case.random(rows, inputs), weights, [case.random(outputs) if biased else None, None]


@pytest.mark.parametrize("dtype", ("fp32", "bf16", "fp16"))
@pytest.mark.parametrize("rows", (1, 5, 16, 32))
@pytest.mark.parametrize(("outputs", "inputs"), SIZES)
def test_as_defined(kernel, rows, outputs, inputs, dtype):
    arguments = rows_case(rows, outputs, inputs, dtype, biased=rows > 1)
    found = kernel(*arguments)
    assert all(out.dtype == arguments[0].dtype for out in found)
    same(found, linear_rows(*arguments), arguments[0].dtype)


def test_inputs_are_divided_by_the_weight_alone(interpreter):
    from eepass.codegen.kernels.linear_rows import INPUTS, OUTPUTS
    from eepass.codegen.kernels.split_inputs import PROGRAMS, divided

    parts = [
        divided(*size, OUTPUTS, INPUTS)
        for size in (*SIZES, (1536, 4608), (4608, 4608), (12288, 4608))
    ]
    assert [count for count, _ in parts] == [1, 1, 2, 4, 4, 1, 1]
    for (count, span), (_, inputs) in zip(parts, SIZES, strict=False):
        assert span % INPUTS == 0 and (count - 1) * span < inputs <= count * span
    # the counters are enough, and a power of two tells the last
    for outputs in range(1, 6000, 31):
        count, _ = divided(outputs, 12288, OUTPUTS, INPUTS)
        assert count & (count - 1) == 0 and (count == 1 or -(-outputs // 32) < PROGRAMS)


@pytest.mark.parametrize("dtype", ("fp32", "bf16"))
@pytest.mark.parametrize(("outputs", "inputs"), SIZES[2:])
def test_a_row_has_the_same_bits_among_any_number_of_rows(kernel, outputs, inputs, dtype):
    """Of those that are multiplied as one tile."""
    x, weights, biases = rows_case(32, outputs, inputs, dtype)
    both, x = kernel(x, weights, biases), x[:16]
    whole = kernel(x, weights, biases)
    for part, every in zip(kernel(x.repeat(2, 1)[:25], weights, biases), both, strict=True):
        assert torch.equal(part[:16], every[:16])
    for begin, end in ((0, 1), (3, 4), (15, 16), (0, 2), (5, 9), (2, 15)):
        for part, every in zip(kernel(x[begin:end], weights, biases), whole, strict=True):
            assert torch.equal(part, every[begin:end])


def test_the_order_in_which_programs_run_does_not_show(kernel, any_order):
    """Whichever program of a tile is the last, it adds the parts from the first to the last."""
    arguments = rows_case(3, 70, 2500)
    expected, orders = kernel(*arguments), any_order()
    for _ in range(6):
        for found, wanted in zip(kernel(*arguments), expected, strict=True):
            assert torch.equal(found, wanted)
    assert len(orders) == 12


def test_launches_that_divide_inputs_otherwise_do_not_disturb_one_another(kernel):
    """They share counters: one of two parts is followed by one of four."""
    for inputs in (1100, 2500, 1100, 1100, 2500):
        x, weights, biases = rows_case(2, 7, inputs)
        arguments = x, weights[:1], biases[:1]
        same(kernel(*arguments), linear_rows(*arguments))


def test_more_rows_are_refused(kernel):
    with pytest.raises(ValueError, match="33 rows, the kernel takes 32 at most"):
        kernel(*rows_case(33, 4, 64))
