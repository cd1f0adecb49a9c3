"""attend_rows and attend_spans in Triton's interpreter against their reference implementations, in
any order of programs."""

import pytest
import torch
from kernel_cases import Case, same

from eepass.masks import causal_mask_at, spans_at
from eepass.ops.rows import attend_rows, attend_spans, spans_mask

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


@pytest.fixture
def over_spans(interpreter):
    from eepass.codegen.kernels.register import run_kernels

    return lambda *arguments: run_kernels("attend_spans", *arguments)


def span_case(rows, sizes, dtype="fp32", end=None, window=None):
    q, keys, values, _, scale = attention_case(rows, sizes, dtype, end, window)
    end = sizes[2] if end is None else end
    return q, keys, values, spans_at(torch.arange(end - rows, end), window), scale


def tree_case(dtype="fp32", slots=200, base=144, window=None):
    """Six rows of a tree after ``base`` tokens."""
    from eepass.runtime.step.speculating import _paths, depths, tree_spans

    case, paths = Case(dtype), _paths(torch.tensor([0, 0, 0, 1, 2, 0]))
    rows, spans = base + torch.arange(6), torch.empty(6, 3, dtype=torch.long)
    tree_spans(rows, base + depths(paths), paths, spans, window=window)
    q = case.random(6, 4, 24).transpose(0, 1)
    keys, values = case.random(2, slots, 24), case.random(2, slots, 40)
    return q, keys, values, spans, 0.2


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


@pytest.mark.parametrize("window", (None, 40, -50))
@pytest.mark.parametrize("rows", (1, 5, 32))
@pytest.mark.parametrize("sizes", SIZES)
def test_spans_are_the_masks_they_stand_for(kernel, over_spans, rows, sizes, window):
    if sizes[2] > 1000 and rows > 5:
        pytest.skip("the interpreter runs program after program")
    q, keys, values, mask, scale = attention_case(rows, sizes, "bf16", window=window)
    spans = span_case(rows, sizes, "bf16", window=window)[3]
    assert torch.equal(spans_mask(spans, sizes[2], mask.dtype)[0, 0], mask)
    found = over_spans(q, keys, values, spans, scale)
    assert torch.equal(found, kernel(q, keys, values, mask, scale))
    same([found], [attend_spans(q, keys, values, spans, scale)], found.dtype)


@pytest.mark.parametrize("window", (None, 3, 60))
@pytest.mark.parametrize("base", (144, 190, 0))
def test_a_tree_from_its_bit_fields(over_spans, base, window):
    arguments = tree_case(base=base, window=window)
    assert (arguments[3][:, 2] > 0).all()
    same([over_spans(*arguments)], [attend_spans(*arguments)])


def test_the_highest_bit_is_seen_whatever_lies_below_it(over_spans):
    """Up to the 63rd slot of a tree; slots behind the highest are not read."""
    q, keys, values, _, scale = span_case(1, (4, 2, 400, 16, 16))
    for bits in (1, 2**30 + 1, 2**31 - 1, 2**62, 2**63 - 1, 2**62 + 2**13):
        spans, last = torch.tensor([[0, 130, bits]]), 130 + bits.bit_length()
        keys[:, last:], values[:, last:] = 7.0, 9.0
        same([over_spans(q, keys, values, spans, scale)],
             [attend_spans(q, keys, values, spans, scale)])  # fmt: skip


def test_a_tree_a_window_and_a_bias(kernel):
    q, keys, values, mask, scale = attention_case(6, SIZES[1], end=150, window=40)
    # of the rows' own slots each sees some
    mask[:, 144:150] = torch.finfo(mask.dtype).min
    for row, path in enumerate(([0], [0, 1], [0, 2], [0, 1, 3], [0, 2, 4], [0, 5])):
        mask[row, [144 + node for node in path]] = 0.25 * row
    same([kernel(q, keys, values, mask, scale)], [attend_rows(q, keys, values, mask, scale)],
         q.dtype)  # fmt: skip


FORMS = pytest.mark.parametrize("form", ("mask", "spans"))


def form_case(form, kernel, over_spans, *case, **options):
    """The kernel of a form and its arguments."""
    if form == "mask":
        return kernel, attention_case(*case, **options)
    return over_spans, span_case(*case, **options)


@FORMS
def test_what_no_row_may_attend_to_is_not_read(kernel, over_spans, form):
    """Behind the text, and before a window: there NaN does not show."""
    run, arguments = form_case(form, kernel, over_spans, 3, SIZES[2], end=1500, window=70)
    expected = run(*arguments)
    for cache in arguments[1:3]:
        cache[:, :1408] = torch.nan
        cache[:, 1536:] = torch.nan
    assert torch.equal(run(*arguments), expected) and expected.isfinite().all()


def test_programs_stop_where_the_text_does(over_spans, monkeypatch):
    """A text of 300 tokens in a cache of 4,200 slots: each tile of 64 is loaded once a group."""
    from triton.runtime.interpreter import interpreter_builder as builder

    arguments, loads = span_case(1, SIZES[2], end=300), []
    load = builder.create_masked_load

    def counted(ptrs, mask, *rest):
        loads.append(tuple(ptrs.data.shape))
        return load(ptrs, mask, *rest)

    monkeypatch.setattr(builder, "create_masked_load", counted)
    over_spans(*arguments)
    # keys are loaded as channels x slots
    assert loads.count((16, 64)) == 2 * 5


@FORMS
def test_a_row_has_the_same_bits_in_whatever_company(kernel, over_spans, form):
    sizes = (*SIZES[2][:2], 1100, 16, 16)
    run, arguments = form_case(form, kernel, over_spans, 32, sizes, "bf16")
    q, keys, values, seen, scale = arguments
    whole = run(*arguments)
    for begin, end in ((0, 1), (31, 32), (3, 9), (16, 32)):
        part = run(q[:, begin:end], keys, values, seen[begin:end], scale)
        assert torch.equal(part, whole[:, begin:end])


@FORMS
def test_a_row_that_may_attend_to_nothing_gets_zeros(kernel, over_spans, form):
    run, arguments = form_case(form, kernel, over_spans, 2, SIZES[0])
    arguments[3][1] = 0 if form == "spans" else torch.finfo(arguments[3].dtype).min
    found = run(*arguments)
    assert not found[:, 1].any() and found[:, 0].all()


@FORMS
def test_the_order_in_which_programs_run_does_not_show(kernel, over_spans, any_order, form):
    run, arguments = form_case(form, kernel, over_spans, 3, SIZES[1])
    expected, orders = run(*arguments), any_order()
    for _ in range(4):
        assert torch.equal(run(*arguments), expected)
    # of two launches each
    assert len(orders) == 8


def test_slots_are_dealt_out_by_groups_and_slots_alone(interpreter):
    from eepass.codegen.kernels.attend_rows import PARTS, PROGRAMS, SLOTS, divided

    assert [divided(8, slots) for slots in (1, 64, 65, 1024, 8192, 32_768)] == [1, 1, 2, 16, 64, 64]
    assert [divided(groups, 32_768) for groups in (1, 24, 72, 600)] == [64, 16, 4, 1]
    for groups in range(1, 700, 13):
        for slots in range(1, 9000, 997):
            parts = divided(groups, slots)
            assert parts & (parts - 1) == 0 and parts <= PARTS
            assert parts == 1 or (parts * groups <= PROGRAMS and (parts - 1) * SLOTS < 2 * slots)
