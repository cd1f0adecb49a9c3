"""The C++ kernels against the reference implementations of their operators."""

import pytest
import torch
from kernel_cases import same_bits

from eepass.codegen.cpu.building import KernelsMissing
from eepass.codegen.cpu.native import kernel_isa, load_kernels
from eepass.ops import rows as row_ops
from eepass.ops.packing import block_size, form_number
from eepass.ops.registry import REFERENCES

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
dtypes = pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("fp32", "bf16"))
ISAS = ("avx512", "avx512-widened", "avx2")


@pytest.fixture(scope="module", autouse=True, params=ISAS)
def isa(request):
    assert load_kernels() == ""
    try:
        yield kernel_isa(request.param)
    except KernelsMissing as error:
        pytest.skip(str(error))
    kernel_isa("best")


def close(found, expected, dtype):
    scale = expected.float().abs().max().clamp_min(1.0)
    assert torch.isfinite(found).all()
    assert (found.float() - expected.float()).abs().max() / scale < TOLERANCE[dtype]


@dtypes
@pytest.mark.parametrize("rows", (1, 2, 4, 8, 3, 15, 16, 64))
@pytest.mark.parametrize("sizes", ((1, 1), (63, 1000), (1000, 63), (17, 32)), ids=str)
def test_linear_rows(dtype, rows, sizes):
    out, depth = sizes
    torch.manual_seed(0)
    x = torch.randn(rows, depth).to(dtype)
    weights = [torch.randn(n, depth).to(dtype) for n in (out, out + 5)]
    biases = [torch.randn(out).to(dtype), None]
    for found, weight, bias in zip(
        torch.ops.eepass.linear_rows(x, weights, biases), weights, biases, strict=True
    ):
        expected = x.float() @ weight.float().T + (0 if bias is None else bias.float())
        close(found, expected, dtype)
        assert found.dtype == dtype


@dtypes
@pytest.mark.parametrize("rows", (1, 4))
def test_logits_rows_are_not_rounded(dtype, rows):
    torch.manual_seed(0)
    z, head, bias = (torch.randn(*s).to(dtype) for s in ((rows, 100), (333, 100), (333,)))
    found = torch.ops.eepass.logits_rows(z, head, bias)
    assert found.dtype == torch.float32
    close(found, row_ops.logits_rows(z, head, bias), torch.float32)


@dtypes
@pytest.mark.parametrize("sizes", ((1536, 576), (37, 1001), (40, 9000)), ids=str)
def test_a_row_has_the_same_bits_alone_and_with_others(dtype, sizes):
    torch.manual_seed(0)
    out, depth = sizes
    x, weight = torch.randn(64, depth).to(dtype), torch.randn(out, depth).to(dtype)
    alone = torch.cat([torch.ops.eepass.linear_rows(row[None], [weight], [None])[0] for row in x])
    for rows in (*range(2, 18), 31, 32, 64):
        same_bits(torch.ops.eepass.linear_rows(x[:rows], [weight], [None])[0], alone[:rows])


@pytest.mark.parametrize("sizes", ((1, 1, 1), (4, 16, 4), (1, 8192, 6), (5, 1003, 7)), ids=str)
@pytest.mark.parametrize("likely", ("first", "last", "equal", "anywhere"))
def test_the_largest_logits(sizes, likely):
    rows, count, k = sizes
    torch.manual_seed(0)
    # coarse, so that many are equal: of these the first come first
    logits = torch.randn(rows, count).mul(4).round()
    order = {"first": (1, True), "last": (1, False)}
    if likely in order:
        dim, descending = order[likely]
        logits = logits.sort(dim=dim, descending=descending).values
    elif likely == "equal":
        logits = torch.zeros(rows, count)
    values, index = torch.ops.eepass.top_logits(logits, k)
    expected_values, expected_index = row_ops.top_logits(logits, k)
    assert torch.equal(values, expected_values) and torch.equal(index, expected_index)


def test_a_weight_row_gives_the_same_bits_wherever_it_stands():
    torch.manual_seed(0)
    x, weight = torch.randn(3, 1000).bfloat16(), torch.randn(100, 1000).bfloat16()
    whole = torch.ops.eepass.logits_rows(x, weight, None)
    order = torch.randperm(100)[:53]
    same_bits(torch.ops.eepass.logits_rows(x, weight[order], None), whole[:, order])


@pytest.mark.parametrize("shape", ((5,), (5, 7), (2, 5, 8)), ids=str)
def test_weights_that_do_not_fit_are_refused(shape):
    with pytest.raises(RuntimeError, match="linear_rows"):
        torch.ops.eepass.linear_rows(torch.randn(2, 8), [torch.randn(shape)], [None])


def test_a_bias_or_cache_that_does_not_fit_is_refused():
    with pytest.raises(RuntimeError, match="bias"):
        torch.ops.eepass.linear_rows(torch.randn(2, 8), [torch.randn(5, 8)], [torch.randn(4)])
    q, k, v, mask = (torch.randn(s) for s in ((4, 3, 8), (2, 6, 8), (2, 6, 10), (3, 6)))
    cases = [
        (q[:3], k, v, mask), (q, k[:, :5], v, mask), (q, k, v, mask[:, :5]),
        (q, k, v, mask[:2]), (q[..., :7], k, v, mask), (q, k, v.bfloat16(), mask),
    ]  # fmt: skip
    for wrong in cases:
        with pytest.raises(RuntimeError, match="attend_rows"):
            torch.ops.eepass.attend_rows(*wrong, 0.5)


def test_another_instruction_set_adds_in_another_order(isa):
    """So it is the chosen one that computes, and not always the same."""
    torch.manual_seed(0)
    x, weight = torch.randn(4, 1000), torch.randn(300, 1000)
    here = torch.ops.eepass.logits_rows(x, weight, None)
    other = {"avx2": "best"}.get(isa, "avx2")
    if kernel_isa(other) == isa:
        pytest.skip("this processor has one set alone")
    there = torch.ops.eepass.logits_rows(x, weight, None)
    kernel_isa(isa)
    assert not torch.equal(here, there)
    close(there, here, torch.float32)


def test_an_unknown_instruction_set_is_refused():
    with pytest.raises(KernelsMissing, match="sse"):
        kernel_isa("sse")


@dtypes
@pytest.mark.parametrize("rows", (1, 3))
@pytest.mark.parametrize("width", (64, 33), ids=("d64", "d33"))
def test_attend_rows(dtype, rows, width):
    torch.manual_seed(0)
    q = torch.randn(6, rows, width).to(dtype)
    # a view into a larger cache: strided, as the runtime gives it
    k, v = (torch.randn(2, 90, width).to(dtype)[:, :77] for _ in range(2))
    mask = torch.zeros(rows, 77, dtype=dtype)
    for row in range(rows):
        mask[row, 40 + row :] = torch.finfo(dtype).min
        mask[row, :5] = torch.finfo(dtype).min
    found = torch.ops.eepass.attend_rows(q, k, v, mask, 0.3)
    close(found, row_ops.attend_rows(q, k, v, mask, 0.3), dtype)


@dtypes
@pytest.mark.parametrize("rows", (1, 4, 64))
@pytest.mark.parametrize("heads", ((6, 2), (10, 2), (3, 3)), ids=str)
@pytest.mark.parametrize("width", (64, 40), ids=("d64", "d40"))
def test_masks_with_holes(dtype, rows, heads, width):
    """Rows of several sequences and trees of drafts: each sees slots of its own, with gaps."""
    torch.manual_seed(0)
    queries, groups = heads
    q = torch.randn(queries, rows, width).to(dtype)
    k, v = (torch.randn(groups, 130, width).to(dtype) for _ in range(2))
    forbidden = torch.rand(rows, 130) < 0.4
    forbidden[:, :3] = forbidden[:, 101:] = True
    forbidden[:, 50] = False
    mask = torch.zeros(rows, 130, dtype=dtype).masked_fill(forbidden, torch.finfo(dtype).min)
    found = torch.ops.eepass.attend_rows(q, k, v, mask, 0.3)
    close(found, row_ops.attend_rows(q, k, v, mask, 0.3), dtype)
    for row in {0, rows - 1}:
        # rubbish in slots a row must not see leaves its bits alone, and so do other rows
        rubbish = forbidden[row, :, None] * 1e4
        alone = torch.ops.eepass.attend_rows(
            q[:, row : row + 1], (k + rubbish).to(dtype), (v + rubbish).to(dtype),
            mask[row : row + 1], 0.3,
        )  # fmt: skip
        assert torch.equal(alone[:, 0], found[:, row])


@dtypes
def test_a_row_has_the_same_bits_wherever_its_slots_lie(dtype):
    """A draft in a tree sees its slots with gaps between them, dense decoding in a row."""
    torch.manual_seed(0)
    q = torch.randn(6, 3, 64).to(dtype)
    k, v = (torch.randn(2, 90, 64).to(dtype) for _ in range(2))
    forbidden = torch.finfo(dtype).min
    mask = torch.full((3, 90), forbidden, dtype=dtype)
    mask[:, :40] = 0
    expected = torch.ops.eepass.attend_rows(q, k, v, mask, 0.125)
    slots = torch.cat([torch.arange(33), torch.tensor([35, 36, 50, 51, 60, 77, 89])])
    scattered = [torch.randn(2, 90, 64).to(dtype) for _ in range(2)]
    for there, here in zip(scattered, (k, v), strict=True):
        there[:, slots] = here[:, :40]
    other = torch.full((3, 90), forbidden, dtype=dtype)
    other[:, slots] = 0
    assert torch.equal(torch.ops.eepass.attend_rows(q, *scattered, other, 0.125), expected)


@dtypes
def test_long_rows_of_different_lengths(dtype):
    """More slots than a thread takes at once; each row gives the bits it gives alone."""
    torch.manual_seed(0)
    q = torch.randn(6, 18, 64).to(dtype)
    k, v = (torch.randn(2, 700, 64).to(dtype) for _ in range(2))
    allowed = torch.rand(18, 700) < 0.9
    lengths = torch.tensor([700, 1, 128, 129, 256, 640, *range(400, 412)])
    allowed &= torch.arange(700) < lengths[:, None]
    allowed[:, 0] = True
    mask = torch.zeros(18, 700, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)
    found = torch.ops.eepass.attend_rows(q, k, v, mask, 0.2)
    close(found, row_ops.attend_rows(q, k, v, mask, 0.2), dtype)
    for row in range(18):
        alone = torch.ops.eepass.attend_rows(q[:, [row]], k, v, mask[[row]], 0.2)
        assert torch.equal(alone[:, 0], found[:, row])


@dtypes
@pytest.mark.parametrize("rows", (1, 5, 33))
def test_selected_slots(dtype, rows):
    """The bits that a mask of the selected slots gives, and nothing is read of the others."""
    torch.manual_seed(0)
    q = torch.randn(6, rows, 64).to(dtype)
    k, v = (torch.randn(2, 700, 64).to(dtype) for _ in range(2))
    forbidden = torch.rand(rows, 700) < 0.2
    mask = torch.randn(rows, 700).to(dtype).masked_fill(forbidden, torch.finfo(dtype).min)
    chosen = torch.rand(rows, 700) < torch.linspace(0.1, 0.6, rows)[:, None]
    slots = torch.full((rows, 650), -1, dtype=torch.int32)
    for row in range(rows):
        own = chosen[row].nonzero().flatten()
        slots[row, : len(own)] = own
    wanted = torch.ops.eepass.attend_rows(
        q, k, v, torch.ops.eepass.allow_selected(mask, slots), 0.125
    )
    found = torch.ops.eepass.attend_selected(q, k, v, mask, slots, 0.125)
    assert torch.equal(found, wanted)
    if rows == 1:
        hidden = (k.masked_fill(~chosen[0, :, None], float("nan")), v)
        assert torch.equal(torch.ops.eepass.attend_selected(q, *hidden, mask, slots, 0.125), wanted)
    close(found, row_ops.attend_selected(q, k, v, mask, slots, 0.125), dtype)


@dtypes
def test_all_slots_selected_are_the_bits_of_attention_to_all(dtype):
    torch.manual_seed(0)
    q = torch.randn(6, 2, 64).to(dtype)
    k, v = (torch.randn(2, 300, 64).to(dtype) for _ in range(2))
    mask = torch.zeros(2, 300, dtype=dtype)
    mask[:, 200:] = torch.finfo(dtype).min
    # one list for both rows; slots that there are not are none
    slots = torch.cat([torch.arange(201), torch.tensor([300, 5000, -7])]).int().expand(2, -1)
    found = torch.ops.eepass.attend_selected(q, k, v, mask, slots, 0.125)
    assert torch.equal(found, torch.ops.eepass.attend_rows(q, k, v, mask, 0.125))


def test_slots_that_fit_no_rows_are_refused():
    q, k, v, mask = (torch.randn(s) for s in ((4, 3, 8), (2, 6, 8), (2, 6, 10), (3, 6)))
    for wrong in (torch.zeros(2, 4).int(), torch.zeros(3, 4).long(), torch.zeros(3).int()):
        with pytest.raises(RuntimeError, match="attend_selected: slots"):
            torch.ops.eepass.attend_selected(q, k, v, mask, wrong, 0.5)


def test_a_value_that_is_not_a_number_is_not_hidden():
    q, k, v = torch.randn(2, 1, 64), torch.randn(1, 50, 64), torch.randn(1, 50, 64)
    k[0, 7, 3] = float("nan")
    assert torch.ops.eepass.attend_rows(q, k, v, torch.zeros(1, 50), 0.1).isnan().all()


def test_a_row_that_sees_nothing_gives_zeros():
    q, k, v = torch.randn(2, 1, 64), torch.randn(1, 50, 64), torch.randn(1, 50, 64)
    mask = torch.full((1, 50), torch.finfo(torch.float32).min)
    assert not torch.ops.eepass.attend_rows(q, k, v, mask, 0.1).any()


def test_attention_never_reads_what_the_mask_forbids():
    q, k, v = torch.randn(2, 1, 64), torch.randn(1, 50, 64), torch.randn(1, 50, 64)
    mask = torch.zeros(1, 50)
    mask[:, 30:] = torch.finfo(torch.float32).min
    expected = torch.ops.eepass.attend_rows(q, k, v, mask, 0.1)
    k[:, 30:], v[:, 30:] = float("nan"), float("nan")
    assert torch.equal(torch.ops.eepass.attend_rows(q, k, v, mask, 0.1), expected)


# a weight of 30 outputs x 64 inputs, 4 bits in groups of 32
FORM = form_number("u4", 32)
PACKED = torch.randint(0, 256, (2, block_size(FORM, 64)), dtype=torch.uint8)
wide = torch.randn(2, 64)
x, weight, drafts = torch.randn(2, 8), torch.randn(30, 8), torch.zeros(2, 2).long()
OPERATORS = {
    "translate": (x, torch.ones(8), torch.randn(4, 8), torch.randn(8, 4)),
    "draft_logits": (x, weight, None, drafts),
    "predict_exit": (
        torch.randn(1, 4), torch.zeros(1, 4), torch.randn(16, 12), torch.zeros(16),
        torch.randn(16), torch.zeros(1),
    ),
    "linear_rows": (x, [weight, weight[:5]], [None, torch.randn(5)]),
    "logits_rows": (x, weight, None),
    "attend_rows": (
        torch.randn(4, 3, 8), torch.randn(2, 6, 8), torch.randn(2, 6, 10), torch.zeros(3, 6), 0.5
    ),
    "attend_spans": (
        torch.randn(4, 3, 8), torch.randn(2, 6, 8), torch.randn(2, 6, 10),
        torch.tensor([[0, 4, 0], [1, 4, 1], [2, 3, 5]]), 0.5,
    ),
    "spans_mask": (torch.tensor([[0, 4, 0], [1, 4, 1]]), 6, torch.bfloat16),
    "prefix_mask": (torch.tensor([1, 5, 3]), 3, 6, torch.bfloat16, torch.device("cpu")),
    "attend_prefix": (
        torch.randn(4, 3, 8), torch.randn(2, 6, 8), torch.randn(2, 6, 10),
        torch.tensor([1, 5, 0]), 0.5,
    ),
    "allow_selected": (torch.zeros(1, 1, 3, 6), torch.tensor([[0, 2, -1]] * 3).int()),
    "attend_selected": (
        torch.randn(4, 3, 8), torch.randn(2, 6, 8), torch.randn(2, 6, 10), torch.zeros(3, 6),
        torch.tensor([[0, 2, -1]] * 3).int(), 0.5,
    ),
    "top_logits": (torch.randn(3, 40), 5),
    "packed_linear": (wide, PACKED, FORM, 30, None, 0),
    "packed_rows": (wide, [PACKED, PACKED], [FORM, FORM], [30, 20], [None, torch.randn(20)], 0),
    "packed_logits": (wide, PACKED, FORM, 30, None, 1),
    "packed_draft_logits": (wide, PACKED, FORM, 30, None, drafts),
    "unpack": (PACKED, FORM, 30, torch.tensor([3, 29])),
    "pack_groups": (
        torch.zeros(30, 64, dtype=torch.uint8), torch.rand(30, 2), torch.rand(30, 2), FORM
    ),
    "pack_gguf": (
        torch.zeros(30, 2 * 18, dtype=torch.uint8), form_number("q4_0"), None,
        torch.empty(2, 2 * 288, dtype=torch.uint8),
    ),
    "select_outputs": (PACKED, FORM, torch.tensor([3, 29, 3])),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_are_registered_as_torch_wants_them(name):
    torch.library.opcheck(
        getattr(torch.ops.eepass, name).default,
        OPERATORS[name],
        test_utils=("test_schema", "test_faketensor"),
    )


def test_every_operator_has_a_fake_that_a_test_checks():
    # those of whole exit points are checked beside their kernels
    fused = {"exit_predictor", "verify_head", "draft_topk"}
    ours = [o for o, r in REFERENCES.items() if r.__module__.startswith("eepass.ops.")]
    assert {str(operator).split(".")[1] for operator in ours} == fused | OPERATORS.keys()
