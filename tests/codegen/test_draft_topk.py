"""draft_topk in Triton's interpreter against its definition."""

import pytest
import torch
from kernel_cases import Case, same

from eepass import fused_ops


@pytest.fixture
def kernel(interpreter):
    from eepass.codegen.kernels.draft_topk import draft_topk

    return draft_topk


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
    ),
    ids=str,
)
def test_as_defined(kernel, case):
    arguments = arguments_of(**case)
    same(kernel(*arguments), fused_ops.draft_topk(*arguments))


def test_equal_logits_come_in_order(kernel):
    arguments = arguments_of(1, 16, 90, 6)
    arguments[1][:] = arguments[1][0]
    assert kernel(*arguments)[1].tolist() == [[0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize("bad", (float("nan"), float("inf"), -float("inf")), ids=str)
def test_what_is_not_finite(kernel, bad):
    arguments = arguments_of(1, 16, 90, 6)
    arguments[0][:] = 1.0
    arguments[1][[7, 50], 0] = bad
    same(kernel(*arguments), fused_ops.draft_topk(*arguments))


def test_more_than_there_are_is_refused(kernel):
    with pytest.raises(ValueError, match="k=91: the vocabulary has 90"):
        kernel(*arguments_of(1, 16, 90, 91))


def test_the_operator_is_registered_as_torch_wants_it():
    torch.library.opcheck(
        torch.ops.eepass.draft_topk.default,
        tuple(arguments_of(2, 16, 90, 6, hot=True)),
        test_utils=("test_schema", "test_faketensor"),
    )
