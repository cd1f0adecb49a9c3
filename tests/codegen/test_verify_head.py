"""verify_head in Triton's interpreter against its reference implementation."""

from functools import partial

import pytest
import torch
from kernel_cases import VERIFIES, Case, same, verify_case

from eepass.ops import fused


@pytest.fixture
def kernel(interpreter):
    from eepass.codegen.kernels.register import run_kernels

    return partial(run_kernels, "verify_head")


def rounded(case):
    return Case(case.get("dtype", "fp32")).dtype


@pytest.mark.parametrize("case", VERIFIES.values(), ids=VERIFIES.keys())
def test_as_defined(kernel, case):
    arguments = verify_case(**case)
    expected = fused.verify_head(*arguments)
    assert expected[1][0]
    same(kernel(*arguments), expected, rounded(case))


@pytest.mark.parametrize("rows, vocabulary", ((1, 49_152), (3, 49_152), (1, 262_144)))
def test_large_vocabularies(kernel, monkeypatch, rows, vocabulary):
    from eepass.codegen.kernels import verify_head

    # the interpreter takes its time for each program
    monkeypatch.setattr(verify_head, "TOKENS", 4096 if vocabulary < 10**5 else 16384)
    arguments = verify_case(rows, hidden=24, vocabulary=vocabulary)
    same(kernel(*arguments), fused.verify_head(*arguments))


@pytest.mark.parametrize("rows", (1, 3))
def test_of_equal_logits_the_first_wins(kernel, rows):
    # small integers and no norm: sums are exact, so equal rows of the head have equal logits in
    # whatever order a library adds
    arguments = verify_case(rows, vocabulary=100, norm="none")
    hidden = arguments[0].mul_(4).round_()
    arguments[6][:] = 0
    arguments[6][40] = arguments[6][77] = arguments[6][99] = hidden[0].sign()
    token, _, logits = kernel(*arguments)
    expected, _, expected_logits = fused.verify_head(*arguments)
    assert torch.equal(logits, expected_logits) and torch.equal(token, expected)
    for found in (logits, expected_logits):
        assert found[0, 40] == found[0, 77] == found[0, 99] > 0
    assert token[0] == 40
    arguments[6][:] = -0.0
    arguments[6][5:] = 0.0
    for verify in (kernel, fused.verify_head):
        assert verify(*arguments)[0].tolist() == [0] * rows


def test_a_nan_with_a_sign_is_a_nan(kernel):
    arguments = verify_case(rows=1, hidden=32, vocabulary=100)
    arguments[6][60] = torch.tensor([0xFFC00000 - 2**32], dtype=torch.int32).view(torch.float32)
    assert kernel(*arguments)[0].item() == fused.verify_head(*arguments)[0].item() == 60


@pytest.mark.parametrize("bad", (float("nan"), float("inf"), -float("inf")), ids=str)
def test_what_is_not_finite(kernel, bad):
    arguments = verify_case(rows=2, hidden=32, vocabulary=100)
    arguments[6][60, 3] = bad
    arguments[6][80, 3] = bad
    found, expected = kernel(*arguments), fused.verify_head(*arguments)
    same(found, expected)
    arguments[0][1, 0] = bad
    token, known, _ = kernel(*arguments)
    assert torch.equal(token[:1], expected[0][:1]) and 0 <= token[1] < 100
    assert token[1] == fused.verify_head(*arguments)[0][1]
    assert known[1] == (token[1] == arguments[10][1]).any()


def test_a_token_twice_in_the_draft_is_there(kernel):
    arguments = verify_case(rows=2, hidden=32, vocabulary=100)
    token = fused.verify_head(*arguments)[0]
    arguments[10][0] = token[0]
    arguments[10][1] = (token[1] + 1) % 100
    assert kernel(*arguments)[1].tolist() == [True, False]


def test_tensors_may_lie_anywhere(kernel):
    arguments = verify_case(rows=2, hidden=32, vocabulary=100)
    expected = fused.verify_head(*arguments)
    arguments[0] = arguments[0].t().contiguous().t()
    arguments[10] = arguments[10].t().contiguous().t()
    wide = torch.full((100, 50), float("nan"))
    wide[:, 7:39] = arguments[6]
    arguments[6] = wide[:, 7:39]
    same(kernel(*arguments), expected)


def test_the_operator_is_registered_as_torch_wants_it():
    for logits in (False, True):
        torch.library.opcheck(
            torch.ops.eepass.verify_head.default,
            tuple(verify_case(rows=2, logits=logits)),
            test_utils=("test_schema", "test_faketensor"),
        )
