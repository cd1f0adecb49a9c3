"""Shared fixtures: tiny models, split and compiled once a session."""

import contextlib
import math
import os
import warnings

# before torch counts the cores: tests run beside one another, and so do processes they start
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

import eepass.kept.splits
from eepass.codegen.cpu.building import KernelsMissing, build_kernels

# nothing is kept: what a test changes in a pass must neither be hidden by what was kept before nor
# be kept for others
eepass.kept.splits.KEPT = f"{os.devnull}/none"

if not torch.cuda.is_available():
    # read when triton is imported; with a GPU, tests/gpu runs the kernels on it
    os.environ.setdefault("TRITON_INTERPRET", "1")
# tiny models: a second thread costs more than it brings
torch.set_num_threads(1)


def pytest_configure(config):
    # once and before there are workers; tests choose among instruction sets
    if not hasattr(config, "workerinput"):
        with contextlib.suppress(KernelsMissing):
            build_kernels(every=True)


@pytest.fixture(autouse=True)
def no_gradients_and_no_luck():
    """Uninitialised memory is NaN, so that an element a kernel leaves unwritten fails a test."""
    warnings.filterwarnings("ignore", message=".*deterministic.*")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    with torch.no_grad():
        yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def interpreter():
    """Triton kernels run in Triton's interpreter, on CPU tensors."""
    triton, numpy = pytest.importorskip("triton"), pytest.importorskip("numpy")
    if triton.__version__ < "3.7" and numpy.lib.NumpyVersion(numpy.__version__) >= "2.4.0":
        pytest.skip("Triton 3.6's interpreter converts arrays as NumPy before 2.4 did")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("the interpreter is off: tests/gpu runs these cases on the GPU")


@pytest.fixture
def kernels(interpreter):
    from eepass.codegen.kernels.register import register_kernels, unregister_kernels

    register_kernels(key="CPU")
    yield
    unregister_kernels("CPU")


@pytest.fixture
def any_order(interpreter, monkeypatch):
    """Called, it lets a kernel's programs run in random orders from there on, and returns the set
    of orders that were taken."""
    from triton.runtime.interpreter import interpreter_builder as builder

    place, generator = builder.set_grid_idx, torch.Generator().manual_seed(0)

    def begin():
        order, taken = [], set()

        def permuted(x, y, z):
            _, height, depth = builder.grid_dim
            index = (x * height + y) * depth + z
            if index == 0:
                size = math.prod(builder.grid_dim)
                order[:] = torch.randperm(size, generator=generator).tolist()
                taken.add(tuple(order))
            rest, last = divmod(order[index], depth)
            place(*divmod(rest, height), last)

        monkeypatch.setattr(builder, "set_grid_idx", permuted)
        return taken

    return begin


@pytest.fixture(scope="session")
def llama():
    from models import tiny_model

    return tiny_model("llama")


@pytest.fixture(scope="session")
def llama_splits(llama):
    from eepass.passes.pipeline import split_for_rows

    with torch.no_grad():
        return split_for_rows(llama, 128, (1, 2, 4, 8), 16)[0]


@pytest.fixture(scope="session")
def transformed(llama):
    """A compiled tiny llama with a random artefact; tests configure it as they need."""
    from models import random_artifact

    from eepass.model import transform

    return transform(llama, random_artifact(llama), max_length=128)
