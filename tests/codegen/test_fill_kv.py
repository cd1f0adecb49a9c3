"""fill_kv in Triton's interpreter against its reference implementation."""

from functools import partial

import pytest
import torch
from kernel_cases import FILLS, fill_case, same

from eepass.ops import fused


@pytest.fixture
def kernel(interpreter):
    from eepass.codegen.kernels.register import run_kernels

    return partial(run_kernels, "fill_kv")


@pytest.mark.parametrize("case", FILLS.values(), ids=FILLS.keys())
def test_as_defined(kernel, case):
    found, expected = fill_case(**case), fill_case(**case)
    kernel(*found)
    fused.fill_kv(*expected)
    slots = found[13]
    for caches, wanted in zip(found[9:11], expected[9:11], strict=True):
        same(caches, wanted)
        for cache in caches:
            assert cache[:, slots].abs().min(-1).values.ne(0).any()
            # other slots are left alone
            others = [s for s in range(20) if s not in slots.tolist()]
            assert not cache[:, others].any()


def test_caches_that_are_not_alike_are_refused(kernel):
    arguments = fill_case()
    arguments[10][1] = arguments[10][1][:, :10]
    with pytest.raises(ValueError, match="share shape"):
        kernel(*arguments)
    arguments = fill_case()
    arguments[3][0] = arguments[3][0].t().contiguous().t()
    with pytest.raises(ValueError, match="equally far apart"):
        kernel(*arguments)
    arguments = fill_case()
    arguments[1][1] = torch.ones(126)[::2]
    with pytest.raises(ValueError, match="norms must be contiguous"):
        kernel(*arguments)
    arguments = fill_case(bias=True)
    arguments[4][1] = arguments[4][1].half()
    with pytest.raises(ValueError, match="of one dtype"):
        kernel(*arguments)


def test_what_is_not_finite_stays_in_its_slot(kernel):
    found, expected = fill_case(rows=3, hidden=32), fill_case(rows=3, hidden=32)
    for arguments in (found, expected):
        arguments[0][1, 5] = float("nan")
        arguments[0][2, 5] = float("inf")
    kernel(*found)
    fused.fill_kv(*expected)
    same(found[9] + found[10], expected[9] + expected[10])
    for cache in (*found[9], *found[10]):
        undefined = cache.isnan().any(-1).any(0)
        assert undefined.nonzero().flatten().tolist() == sorted(found[13][1:].tolist())


def test_tensors_may_lie_anywhere(kernel):
    found, expected = fill_case(rows=3), fill_case(rows=3)
    found[0] = found[0].t().contiguous().t()
    found[11], found[12] = (values.t().contiguous().t() for values in found[11:13])
    found[13] = found[13].repeat_interleave(2)[::2]
    kernel(*found)
    fused.fill_kv(*expected)
    same(found[9] + found[10], expected[9] + expected[10])


def test_caches_within_a_larger_one(kernel):
    found, expected = fill_case(), fill_case()
    rest = torch.full((2, 2, 20, 40), float("nan"))
    rest[:, :, :, 8:24] = 0
    found[9] = [rest[0, :, :, 8:24], rest[1, :, :, 8:24]]
    found[10] = [torch.zeros(2, 20, 40)[:, :, 8:24] for _ in range(2)]
    kernel(*found)
    fused.fill_kv(*expected)
    same(found[9], expected[9])
    assert rest[..., :8].isnan().all() and rest[..., 24:].isnan().all()


def test_the_operator_is_registered_as_torch_wants_it():
    torch.library.opcheck(
        torch.ops.eepass.fill_kv.default,
        tuple(fill_case()),
        test_utils=("test_schema", "test_faketensor"),
    )
