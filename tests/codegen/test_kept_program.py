"""Programs that are kept hold calls of known functions, nothing else."""

import pytest
import torch

from eepass.codegen.kept_program import NotKept, check_program, run_program


def test_a_program_runs_without_its_kernels_compiler():
    program = """
x, y = args
args.clear()
buf0 = empty_strided_cpu((2, 3), (3, 1), torch.float32)
extern_kernels.mm(x, y, out=buf0)
buf1 = torch.ops.aten.mul.Tensor(buf0, -2.0)
del buf0
return (reinterpret_tensor(buf1, (3, 2), (1, 3), 0), buf1)
"""
    x, y = torch.rand(2, 4), torch.rand(4, 3)
    transposed, product = run_program(program, None)([x, y])
    assert torch.equal(product, x @ y * -2) and torch.equal(transposed, product.T)


@pytest.mark.parametrize(
    "line",
    [
        "import os",
        "x = __import__('os')",
        "x = open('/etc/passwd')",
        "x = args.__class__",
        "x = torch.load('file')",
        "x = torch.ops.load_library('file.so')",
        "x = torch.ops.other.run.default(1)",
        "x = eval('1')",
        "x = [y for y in args]",
        "x = (lambda: 1)()",
        "kernel_0 = args",
        "args[0].x = 1",
        "x = kernel_0.__self__",
        "while True: pass",
        "x = torch.serialization",
        "def f(): pass",
        "x = f'{args}'",
        "return args",
    ],
)
def test_other_lines_are_refused(line):
    check_program("x = kernel_0(args)\nreturn (x,)")
    with pytest.raises(NotKept):
        check_program(f"{line}\nreturn (args,)")


@pytest.mark.parametrize("program", ["", "x = args", "return", "return (", "return os"])
def test_a_program_that_returns_nothing_known_is_refused(program):
    with pytest.raises(NotKept):
        check_program(program)
