"""Rows that begin past 2**31 elements, in memory that is only there where it is touched."""

import mmap

import pytest
import torch
from kernel_cases import Case, exit_case, same, verify_case

from eepass.ops import fused

# between rows: the second begins past 2**30 elements, the fourth past 3 · 2**30
APART = 2**30 + 64


@pytest.fixture(scope="module")
def memory():
    # MAP_NORESERVE of Linux, which Python names from 3.13 on
    return mmap.mmap(-1, 2 * (3 * APART + 4096), flags=mmap.MAP_PRIVATE | 0x4000)


def far(memory, rows):
    """Values of ``rows`` [N <= 4, M], of one or two bytes, with ``APART`` elements between."""
    whole = torch.frombuffer(memory, dtype=rows.dtype)
    spread = whole.as_strided(rows.shape, (APART, 1))
    spread.copy_(rows)
    assert spread.stride(0) * (len(rows) - 1) > 2**31
    return spread


def test_exit_predictor(interpreter, memory):
    from eepass.codegen.kernels.register import run_kernels

    arguments = exit_case(hidden=64, drafts=4, head="int8", vocabulary=4)
    arguments[9] = torch.tensor([[3, 0, 2, 3]], dtype=torch.int32)
    expected = fused.exit_predictor(*arguments)
    arguments[6] = far(memory, arguments[6])
    same(run_kernels("exit_predictor", *arguments), expected)


@pytest.mark.parametrize("rows", (1, 3))
def test_verify_head(interpreter, memory, rows):
    from eepass.codegen.kernels.register import run_kernels

    arguments = verify_case(rows, hidden=40, vocabulary=4, head="int8")
    expected = fused.verify_head(*arguments)
    arguments[6] = far(memory, arguments[6])
    same(run_kernels("verify_head", *arguments), expected)


def test_draft_topk(interpreter, memory):
    from eepass.codegen.kernels.register import run_kernels

    case = Case()
    arguments = [case.random(2, 40), *case.head(4, 40, "int8"), None, 4, 1.0, 0.0]
    expected = fused.draft_topk(*arguments)
    arguments[1] = far(memory, arguments[1])
    same(run_kernels("draft_topk", *arguments), expected)
