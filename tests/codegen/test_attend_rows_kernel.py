"""attend_rows in Triton's interpreter against its reference implementation, in any order of
programs."""

import pytest
import torch
from kernel_cases import Case, same

from eepass.masks import causal_mask_at
from eepass.ops.rows import attend_rows

# query heads, groups, slots, channels of keys and of values
SIZES = ((3, 1, 63, 16, 16), (4, 2, 200, 24, 40), (8, 2, 4200, 16, 16))


@pytest.fixture
def kernel(interpreter):
    from eepass.codegen.kernels.register import run_kernels

    return lambda *arguments: run_kernels("attend_rows", *arguments)


def attention_case(rows, sizes, dtype="fp32", end=None, window=None):
    """Rows at the positions before ``end``, the last slot's unless given."""
    heads, groups, slots, channels, outputs = sizes
    case = Case(dtype)
    end = slots if end is None else end
    positions = torch.arange(end - rows, end)
    mask = causal_mask_at(positions, slots, window, case.dtype)[0, 0]
    # as layers hand them over: a view of [rows, heads, channels]
    q = case.random(rows, heads, channels).transpose(0, 1)
    keys, values = case.random(groups, slots, channels), case.random(groups, slots, outputs)
    return q, keys, values, mask, channels**-0.5


@pytest.mark.parametrize("dtype", ("fp32", "bf16", "fp16"))
@pytest.mark.parametrize("rows", (1, 5, 32))
@pytest.mark.parametrize("sizes", SIZES)
def test_as_defined(kernel, rows, sizes, dtype):
    if sizes[2] > 1000 and (rows > 5 or dtype == "fp16"):
        pytest.skip("the interpreter runs program after program")
    arguments = attention_case(rows, sizes, dtype)
    found = kernel(*arguments)
    assert found.dtype == arguments[0].dtype
    same([found], [attend_rows(*arguments)], found.dtype)


def test_a_tree_a_window_and_a_bias(kernel):
    q, keys, values, mask, scale = attention_case(6, SIZES[1], end=150, window=40)
    # of the rows' own slots each sees some
    mask[:, 144:150] = torch.finfo(mask.dtype).min
    for row, path in enumerate(([0], [0, 1], [0, 2], [0, 1, 3], [0, 2, 4], [0, 5])):
        mask[row, [144 + node for node in path]] = 0.25 * row
    same([kernel(q, keys, values, mask, scale)], [attend_rows(q, keys, values, mask, scale)],
         q.dtype)  # fmt: skip


def test_what_no_row_may_attend_to_is_not_read(kernel):
    """Behind the text, and before a window: there NaN does not show."""
    q, keys, values, mask, scale = attention_case(3, SIZES[2], end=1500, window=70)
    expected = attend_rows(q, keys, values, mask, scale)
    for cache in (keys, values):
        cache[:, :1408] = torch.nan
        cache[:, 1536:] = torch.nan
    same([kernel(q, keys, values, mask, scale)], [expected], q.dtype)


def test_a_row_has_the_same_bits_in_whatever_company(kernel):
    q, keys, values, mask, scale = attention_case(32, (*SIZES[2][:2], 1100, 16, 16), "bf16")
    whole = kernel(q, keys, values, mask, scale)
    for begin, end in ((0, 1), (31, 32), (3, 9), (16, 32)):
        part = kernel(q[:, begin:end], keys, values, mask[begin:end], scale)
        assert torch.equal(part, whole[:, begin:end])


def test_a_row_that_may_attend_to_nothing_gets_zeros(kernel):
    q, keys, values, mask, scale = attention_case(2, SIZES[0])
    mask[1] = torch.finfo(mask.dtype).min
    found = kernel(q, keys, values, mask, scale)
    assert not found[:, 1].any() and found[:, 0].all()


def test_the_order_in_which_programs_run_does_not_show(kernel, monkeypatch):
    from triton.runtime.interpreter import interpreter_builder as builder

    arguments = attention_case(3, SIZES[1])
    expected, generator = kernel(*arguments), torch.Generator().manual_seed(0)
    place, orders, seen = builder.set_grid_idx, {}, set()

    def permuted(x, y, z):
        width, height, depth = builder.grid_dim
        index = (x * height + y) * depth + z
        if index == 0:
            orders["now"] = torch.randperm(width * height * depth, generator=generator).tolist()
            seen.add(tuple(orders["now"]))
        rest, last = divmod(orders["now"][index], depth)
        place(*divmod(rest, height), last)

    monkeypatch.setattr(builder, "set_grid_idx", permuted)
    for _ in range(4):
        assert torch.equal(kernel(*arguments), expected)
    assert len(seen) >= 8


def test_parts_go_by_the_slots_alone(interpreter):
    from eepass.codegen.kernels.attend_rows import PARTS, SLOTS, divided

    assert [divided(slots) for slots in (1, 64, 1024, 8192, 32768, 33000)] == [
        (1, 64), (1, 64), (16, 64), (64, 128), (64, 512), (33, 1024)
    ]  # fmt: skip
    for slots in range(1, 200_000, 997):
        parts, span = divided(slots)
        assert (parts - 1) * span < slots <= parts * span and parts <= PARTS
        assert span % SLOTS == 0
