"""Moving weights changes where they lie and nothing else."""

import mmap
import subprocess
import sys

import pytest
import torch

from eepass.checkpoints.weight_memory import settle_weights


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="no large pages here")
def test_weights_keep_their_values_and_ties():
    torch.manual_seed(0)
    first, second = torch.nn.Linear(7, 5), torch.nn.Linear(5, 7).bfloat16()
    tied = torch.nn.Parameter(first.weight.data)
    parameters = [*first.parameters(), *second.parameters(), tied]
    before = [parameter.detach().clone() for parameter in parameters]
    assert settle_weights(parameters) >= sum(tensor.nbytes for tensor in before[:-1])
    for parameter, value in zip(parameters, before, strict=True):
        assert torch.equal(parameter, value)
        assert parameter.data_ptr() % 64 == 0
    assert tied.data_ptr() == first.weight.data_ptr()
    # each has its own storage, so checkpoints are written as before
    assert first.weight.untyped_storage().nbytes() == first.weight.nbytes
    assert first.weight.data_ptr() < second.weight.data_ptr()


def test_what_lies_elsewhere_stays():
    strided = torch.randn(4, 6).t()
    address = strided.data_ptr()
    assert settle_weights([strided]) == 0
    assert strided.data_ptr() == address


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="no large pages here")
def test_what_lies_so_already_stays():
    weights = [torch.randn(5, 3), torch.randn(40)]
    settle_weights(weights)
    addresses = [weight.data_ptr() for weight in weights]
    assert settle_weights(weights) == 64 + 192
    assert [weight.data_ptr() for weight in weights] == addresses


def test_weights_shared_with_other_processes_stay():
    shared = torch.nn.Linear(7, 5).share_memory()
    addresses = [parameter.data_ptr() for parameter in shared.parameters()]
    settle_weights(shared.parameters())
    assert [parameter.data_ptr() for parameter in shared.parameters()] == addresses


def test_what_weights_took_up_before_is_given_back():
    script = """
import resource, torch
from eepass.checkpoints.weight_memory import settle_weights
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
# large blocks are freed at once, and raise what the C library keeps from then on
del (large := [torch.zeros(8 << 20) for _ in range(2)])[:]
weights = [torch.full((1 << 18,), 1.0) for _ in range(400)]
before = peak()
settle_weights(weights)
print(peak() - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    # of 400 MB
    assert int(done.stdout) < 160_000
