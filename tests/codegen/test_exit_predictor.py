"""exit_predictor in Triton's interpreter against its reference implementation."""

from functools import partial

import pytest
import torch
from kernel_cases import EXITS, exit_case, same

from eepass.ops import fused

each_case = pytest.mark.parametrize("case", EXITS.values(), ids=EXITS.keys())


@pytest.fixture
def kernel(interpreter):
    from eepass.codegen.kernels.register import run_kernels

    return partial(run_kernels, "exit_predictor")


@each_case
def test_as_defined(kernel, case):
    arguments = exit_case(**case)
    same(kernel(*arguments), fused.exit_predictor(*arguments))


@pytest.mark.parametrize("norm", ("rms", "layer"))
def test_a_state_wider_than_one_program_is_divided(kernel, monkeypatch, norm):
    from eepass.codegen.kernels import final_state

    monkeypatch.setattr(final_state, "WIDE_SLICE", 32)
    arguments = exit_case(rows=2, hidden=100, norm=norm, norm_bias=norm == "layer")
    same(kernel(*arguments), fused.exit_predictor(*arguments))


def test_tensors_may_lie_anywhere(kernel):
    arguments = exit_case(rows=3, hidden=63, drafts=4, rank=4)
    hidden, lm_head, draft, previous = (arguments[i] for i in (0, 6, 9, 10))
    expected = fused.exit_predictor(*arguments)
    wide = torch.full((6, 80), float("nan"))
    wide[::2, 5:68] = hidden
    arguments[0] = wide[::2, 5:68]
    table = torch.full((1000, 70), float("nan"))
    table[:, 3:66] = lm_head
    arguments[6] = table[:, 3:66]
    arguments[9], arguments[10] = draft.t().contiguous().t(), previous.t().contiguous().t()
    same(kernel(*arguments), expected)
    arguments[6] = lm_head.t().contiguous().t()
    same(kernel(*arguments), expected)


@pytest.mark.parametrize("rank", (0, 3), ids=("lens", "translated"))
@pytest.mark.parametrize("bad", (float("nan"), float("inf"), -float("inf")), ids=str)
def test_a_non_finite_hidden_state_never_triggers_an_exit(kernel, rank, bad):
    arguments = exit_case(rows=3, hidden=70, rank=rank)
    arguments[0][1, 69] = bad
    # without it every row exits
    arguments[15].fill_(-1.0)
    probability, _, _, exits = found = kernel(*arguments)
    same(found[:2], fused.exit_predictor(*arguments)[:2])
    assert exits.tolist() == [True, False, True]
    assert probability.isnan().tolist() == [False, True, False]


def test_a_token_twice_in_the_draft_counts_twice(kernel):
    arguments = exit_case(rows=1, drafts=4)
    arguments[9][0] = arguments[9][0, 0]
    found = kernel(*arguments)
    same(found, fused.exit_predictor(*arguments))
    assert torch.allclose(found[1], torch.full((1, 4), 0.25))


def test_the_threshold_is_read(kernel):
    arguments = exit_case(rows=2)
    chance = kernel(*arguments)[0]
    arguments[15].copy_(chance[:1])
    assert not kernel(*arguments)[3][0]
    arguments[15].copy_(chance[:1] - 1e-4)
    assert kernel(*arguments)[3][0]


@pytest.mark.parametrize("rank", (0, 3), ids=("lens", "translated"))
def test_the_operator_is_registered_as_torch_wants_it(rank):
    torch.library.opcheck(
        torch.ops.eepass.exit_predictor.default,
        tuple(exit_case(rows=2, rank=rank)),
        test_utils=("test_schema", "test_faketensor"),
    )
