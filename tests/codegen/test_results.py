"""Memory of what kernels return."""

from threading import Thread

import torch

from eepass.codegen.cpu.native import load_kernels


def named(rows=3, tokens=8):
    assert not load_kernels()
    return torch.ops.eepass.top_logits(torch.arange(1000.0).repeat(rows, 1), tokens)[0]


def test_freed_memory_is_used_again_and_kept_memory_is_not():
    first = named()
    place = first.data_ptr()
    assert place % 64 == 0
    second = named()
    assert second.data_ptr() != place and torch.equal(first, second)
    del first
    assert named().data_ptr() == place


def test_results_may_be_freed_by_other_threads_and_outlive_their_own():
    made = []
    other = Thread(target=lambda: made.append(named()))
    other.start()
    other.join()
    assert torch.equal(made[0], named())
    # its thread has ended, and another frees it
    other = Thread(target=made.clear)
    other.start()
    other.join()
    assert not made


def test_large_results_are_given_back():
    large = named(rows=4000, tokens=100)
    assert large.data_ptr() % 64 == 0 and torch.equal(large[0], large[-1])
