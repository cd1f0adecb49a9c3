"""draft_topk in Triton's interpreter against its reference implementation."""

from functools import partial

import pytest
import torch
from kernel_cases import Case, same

from eepass.ops import fused


@pytest.fixture
def kernel(interpreter):
    from eepass.codegen.kernels.register import run_kernels

    return partial(run_kernels, "draft_topk")


def arguments_of(
    rows, hidden, vocabulary, k, dtype="fp32", head="", bias=False, hot=False, cap=0.0
):
    case = Case(dtype)
    names = case.ids(10**6, vocabulary) if hot else None
    return [
        case.random(rows, hidden),
        *case.head(vocabulary, hidden, head, bias),
        names,
        k,
        1.0,
        cap,
    ]


@pytest.mark.parametrize(
    "case",
    (
        dict(rows=1, hidden=63, vocabulary=1, k=1),
        dict(rows=1, hidden=63, vocabulary=1000, k=32, hot=True),
        dict(rows=9, hidden=100, vocabulary=200, k=4, dtype="bf16", bias=True),
        dict(rows=2, hidden=64, vocabulary=77, k=77, head="int8", dtype="fp16", cap=4.0),
        dict(rows=32, hidden=40, vocabulary=50, k=1, dtype="fp16"),
        dict(rows=1, hidden=4096, vocabulary=33, k=2, dtype="bf16"),
    ),
    ids=str,
)
def test_as_defined(kernel, case):
    arguments = arguments_of(**case)
    same(kernel(*arguments), fused.draft_topk(*arguments))


@pytest.mark.parametrize("rows, vocabulary", ((1, 49_152), (2, 49_152), (1, 262_144)))
def test_large_vocabularies(kernel, monkeypatch, rows, vocabulary):
    from eepass.codegen.kernels import draft_topk

    # the interpreter takes its time for each program
    monkeypatch.setattr(draft_topk, "TOKENS", 4096 if vocabulary < 10**5 else 16384)
    arguments = arguments_of(rows, 24, vocabulary, 5)
    same(kernel(*arguments), fused.draft_topk(*arguments))


def test_tensors_may_lie_anywhere(kernel):
    arguments = arguments_of(3, 16, 90, 6, hot=True)
    expected = fused.draft_topk(*arguments)
    arguments[0] = arguments[0].t().contiguous().t()
    wide = torch.full((90, 50), float("nan"))
    wide[:, 7:23] = arguments[1]
    arguments[1] = wide[:, 7:23]
    arguments[4] = arguments[4].repeat_interleave(2)[::2]
    same(kernel(*arguments), expected)


@pytest.mark.parametrize("rows", (1, 3))
def test_equal_logits_come_in_order(kernel, rows):
    arguments = arguments_of(rows, 16, 90, 6)
    # small integers: sums are exact, in whatever order a library adds
    for tensor in arguments[:2]:
        tensor.mul_(4).round_()
    arguments[1][:] = arguments[1][0]
    for draft in (kernel, fused.draft_topk):
        assert draft(*arguments)[1].tolist() == [[0, 1, 2, 3, 4, 5]] * rows


@pytest.mark.parametrize("bad", (float("nan"), float("inf"), -float("inf")), ids=str)
def test_what_is_not_finite(kernel, bad):
    arguments = arguments_of(1, 16, 90, 6)
    arguments[0][:] = 1.0
    arguments[1][[7, 50], 0] = bad
    same(kernel(*arguments), fused.draft_topk(*arguments))


def test_more_than_there_are_is_refused(kernel):
    with pytest.raises(ValueError, match="k=91: the vocabulary has 90"):
        kernel(*arguments_of(1, 16, 90, 91))


def test_the_operator_is_registered_as_torch_wants_it():
    torch.library.opcheck(
        torch.ops.eepass.draft_topk.default,
        tuple(arguments_of(2, 16, 90, 6, hot=True)),
        test_utils=("test_schema", "test_faketensor"),
    )
