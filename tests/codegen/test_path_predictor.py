"""path_predictor in Triton's interpreter against its reference implementation."""

from functools import partial

import pytest
import torch
from kernel_cases import exit_case, same

from eepass.ops import fused

PATHS = torch.tensor([[0, -1, -1], [0, 1, 3], [2, -1, -1], [-1, -1, -1]])


@pytest.fixture
def kernel(interpreter):
    from eepass.codegen.kernels.register import run_kernels

    return partial(run_kernels, "path_predictor")


def arguments_of(**case):
    arguments = exit_case(rows=4, **case)
    return [*arguments[:16], PATHS, *arguments[16:]]


@pytest.mark.parametrize(
    "case",
    (dict(), dict(rank=3), dict(hidden=576, dtype="bf16", drafts=16), dict(dtype="fp16", drafts=1)),
    ids=str,
)
def test_as_defined(kernel, case):
    arguments = arguments_of(**case)
    found = kernel(*arguments)
    same(found, fused.path_predictor(*arguments))
    path, node, _, _, exits = found
    # a path exits with its last node, one without nodes never
    assert path.tolist() == [node[0], node[[0, 1, 3]].min(), node[2], 0.0]
    arguments[15].fill_(-1.0)
    assert kernel(*arguments)[4].tolist() == [True] * 4
    arguments[15].fill_(float(path[:3].max()))
    assert not kernel(*arguments)[4].any() and exits.dtype == torch.bool


def test_a_path_with_an_undefined_node_stays(kernel):
    arguments = arguments_of()
    arguments[0][3] = float("nan")
    arguments[15].fill_(-1.0)
    found = kernel(*arguments)
    same(found, fused.path_predictor(*arguments))
    assert found[4].tolist() == [True, False, True, True]


def test_the_operator_is_registered_as_torch_wants_it():
    torch.library.opcheck(
        torch.ops.eepass.path_predictor.default,
        tuple(arguments_of()),
        test_utils=("test_schema", "test_faketensor"),
    )
