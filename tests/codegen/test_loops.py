"""Loops of a segment as one library: names, helpers of the same name, built in the background."""

import ctypes
from concurrent.futures import Future

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from eepass.codegen import loops, native_program
from eepass.codegen.cpu.native import load_kernels
from eepass.codegen.kept_program import NotKept
from eepass.codegen.loops import Loop, build, function
from eepass.codegen.lower_cpu import CpuCompiler
from eepass.codegen.native_program import NativeProgram, runnable

HELPED = """
#include <torch/csrc/inductor/cpp_prefix.h>
static inline float helper(float x) {{ return x + {by}; }}
extern "C"  void  kernel(const float* in_ptr0, float* out_ptr0, const int64_t ks0)
{{
    for (int64_t i = 0; i < ks0; ++i) out_ptr0[i] = helper(in_ptr0[i]);
}}
"""


def test_loops_with_helpers_of_the_same_name_share_a_library():
    library = build([HELPED.format(by=1), HELPED.format(by=2)]).result()
    x, out = torch.arange(5.0), torch.zeros(5)
    for number, by in enumerate((1, 2)):
        function(library, f"kernel_{number}")(x, out, 5)
        assert torch.equal(out, x + by)


def test_the_same_loops_are_built_once():
    assert build([HELPED.format(by=1)]) is build([HELPED.format(by=1)])


def test_a_loop_called_by_other_code_is_built_alone():
    x, out = torch.arange(5.0), torch.zeros(5)
    Loop(HELPED.format(by=3))(x, out, 5)
    assert torch.equal(out, x + 3)


def two_loops(x):
    return torch.sort(x * 2 + 1)[0].exp() / 3


def test_compiling_does_not_wait_for_the_library_and_calling_does(monkeypatch):
    assert load_kernels() == ""
    waiting = Future()
    asked = []
    monkeypatch.setattr(native_program, "build", lambda sources: asked.append(sources) or waiting)
    example = torch.rand(4, 96)
    with torch.no_grad():
        graph = make_fx(two_loops, tracing_mode="fake", pre_dispatch=True)(example)
        compiled = CpuCompiler()(graph, "two loops", [example])
    assert isinstance(compiled, NativeProgram)
    (sources,) = asked
    assert len(sources) == 2
    # the library comes after the segment
    waiting.set_result(loops.build(sources).result())
    torch.testing.assert_close(compiled([example])[0], two_loops(example))


@pytest.mark.parametrize("program", ["kernel_1(a)", "kernel_0(a)\nkernel_7(a)"])
def test_a_library_without_a_loop_of_the_program_is_refused(program):
    library = build([HELPED.format(by=1)]).result()
    with pytest.raises((OSError, NotKept), match=r"kernel_[17]"):
        runnable(f"a, = args\nargs.clear()\n{program}\nreturn (a,)", library)
    with pytest.raises((OSError, NotKept), match="librar"):
        runnable(f"a, = args\nargs.clear()\n{program}\nreturn (a,)", None)


def test_a_library_holds_c_functions_alone():
    library = ctypes.CDLL(str(build([HELPED.format(by=1)]).result()))
    assert loops.address(library, "kernel_0")
    with pytest.raises(OSError, match="kernel_1"):
        loops.address(library, "kernel_1")
