"""Threads that one thread's kernels leave waiting."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in /proc")
def test_threads_that_wait_are_given_back():
    """More threads than processors sleep at each barrier: decoding in another thread took half as
    long again."""
    script = """
import os, time, torch
from eepass.codegen.cpu.native import load_kernels, release_threads
assert not load_kernels()
torch.set_num_threads(2)
def threads():
    return len(os.listdir("/proc/self/task"))
before = threads()
x, weight = torch.randn(4, 64), torch.randn(4096, 64)
for _ in range(2):
    torch.ops.eepass.linear_rows(x, [weight], [None])
    assert threads() == before + 1
    release_threads()
    end = time.monotonic() + 5
    while threads() > before and time.monotonic() < end:
        time.sleep(0.01)
    assert threads() == before
"""
    subprocess.run([sys.executable, "-c", script], check=True)
