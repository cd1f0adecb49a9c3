"""Programs of inductor's code, run line by line in Python and natively: the same bits."""

from itertools import pairwise

import pytest
import torch
from kernel_cases import same_bits
from models import tiny_model

from eepass.codegen.cpu.native import load_kernels
from eepass.codegen.kept_program import program_of, run_program
from eepass.codegen.loops import build, unbuilt
from eepass.codegen.lower_cpu import CpuCompiler, ready_to_compile, through_inductor
from eepass.codegen.native_program import NativeProgram, NotNative, native_program, natively
from eepass.passes.pipeline import split_for_rows
from eepass.runtime.decoder.decoder import Decoder

eager = torch.ops.eepass


@pytest.fixture(scope="module", autouse=True)
def kernels():
    assert load_kernels() == ""


@pytest.fixture(autouse=True)
def _as_in_use():
    """Deterministic algorithms, which tests ask for, write to a cache by another call."""
    torch.use_deterministic_algorithms(False)


def programs(function, *examples):
    """The program of a function's code, and the library of its loops."""
    from torch.fx.experimental.proxy_tensor import make_fx

    graph = make_fx(function, tracing_mode="fake", pre_dispatch=True)(*examples)
    with torch.no_grad(), ready_to_compile(graph, examples, False) as (lowered, fakes), unbuilt():
        program, sources = program_of(through_inductor(lowered, fakes))
    return program, build(sources)


def layer(x, norm, gate, up, down, keys, slots):
    """Loops, operators over lists, a view, a write into a cache and two outputs."""
    z = torch.nn.functional.rms_norm(x, (64,), norm)
    inner = torch.nn.functional.silu(z @ gate.T) * (z @ up.T)
    written = keys.index_copy_(1, slots, z[None])
    return x + torch.nn.functional.linear(inner, down), written.sum(-1)


def given(rows=3):
    torch.manual_seed(0)
    weights = [torch.randn(*shape) for shape in ((64,), (128, 64), (128, 64), (64, 128))]
    slots = torch.arange(rows) + 2
    return [torch.randn(rows, 64), *weights, torch.zeros(1, 16, 64), slots]


def test_the_same_bits_as_in_python():
    program, library = programs(layer, *given())
    python = run_program(program, library.result())
    native = native_program(program, library)
    for seed in range(3):
        inputs = given()
        inputs[0] = inputs[0] * (seed + 1)
        others = [tensor.clone() for tensor in inputs]
        expected, found = python(list(inputs)), native(list(others))
        for one, other in zip(expected, found, strict=True):
            same_bits(one, other)
        same_bits(inputs[5], others[5])
        assert inputs[5].any()


def test_outputs_are_new_each_time():
    native = native_program(*programs(layer, *given()))
    first = native(given())[0]
    kept = first.clone()
    native([tensor * 2 if tensor.is_floating_point() else tensor for tensor in given()])
    same_bits(first, kept)


def test_errors_are_raised_as_in_python():
    native = native_program(*programs(layer, *given()))
    inputs = given()
    inputs[-1] = torch.tensor([1, 2, 99])
    with pytest.raises(RuntimeError, match="index out of bounds"):
        native(inputs)
    with pytest.raises(RuntimeError, match="7 inputs was given 2"):
        native(given()[:2])


def test_every_kind_of_argument():
    """A list with None, a list of integers, a number, a truth value, nothing."""
    program = """\
a, b = args
args.clear()
part = reinterpret_tensor(b, (2, 8), (8, 1), 8)
buf0 = torch.ops.eepass.linear_rows.default(a, [b, part], [None, None])
buf1 = buf0[1]
buf2 = torch.ops.aten.sum.dim_IntList(buf0[0], [0, 1], True, dtype=torch.float32)
buf3 = torch.ops.aten.add.Tensor(buf1, buf1, alpha=-0.5)
buf4 = buf3
del buf3
buf5 = torch.ops.aten.clamp.default(buf4, None, 1)
return (buf5, buf2)
"""
    inputs = [torch.randn(3, 8), torch.randn(5, 8)]
    with pytest.raises(NotNative, match=r"torch\.float32"):
        native_program(program, None)
    program = program.replace(", dtype=torch.float32", "")
    expected = run_program(program, None)(list(inputs))
    for one, other in zip(expected, native_program(program, None)(inputs), strict=True):
        same_bits(one, other)


def test_without_kernels_it_stays_in_python(monkeypatch):
    from eepass.codegen import native_program as module

    monkeypatch.setattr(module, "load_kernels", lambda: "no compiler")
    with pytest.raises(NotNative, match="no compiler"):
        native_program(*programs(layer, *given()))


def test_a_compiled_segment_is_native():
    from torch.fx.experimental.proxy_tensor import make_fx

    graph = make_fx(layer, tracing_mode="fake", pre_dispatch=True)(*given())
    with torch.no_grad():
        compiled = CpuCompiler()(graph, "layer", given())
    assert isinstance(compiled, NativeProgram)
    assert natively(len) is len


@pytest.fixture(scope="module")
def decoder():
    with torch.no_grad():
        return Decoder(split_for_rows(tiny_model(), 64, (1, 2), 16)[0], CpuCompiler())


@pytest.mark.parametrize("rows", [1, 2])
def test_layers_in_one_call_are_the_layers_one_by_one(decoder, rows, monkeypatch):
    torch.manual_seed(0)
    hidden = torch.randn(1, rows, decoder.hidden_size)

    def states(run):
        for keys, values in zip(decoder.kv.keys, decoder.kv.values, strict=True):
            keys.zero_(), values.zero_()
        place = decoder.side_inputs.span(3, rows, 8)
        with torch.no_grad():
            found = run(hidden.clone(), place)
        return [found, *(x.clone() for x in (*decoder.kv.keys, *decoder.kv.values))]

    def one_by_one(state, place):
        for layer in range(decoder.num_layers):
            state = decoder.run_layer(layer, state, place)
        return state

    expected = states(one_by_one)
    monkeypatch.setattr(decoder, "run_layer", None)
    depth = decoder.num_layers
    for stops in ((0, depth), (0, 1, depth)):

        def chained(state, place, stops=stops):
            for begin, end in pairwise(stops):
                (state,) = decoder.run_layers(begin, [end], state, place)
            return state

        for one, other in zip(expected, states(chained), strict=True):
            same_bits(one, other)


def test_a_chain_is_of_native_programs_that_get_their_inputs():
    made = native_program(*programs(layer, *given()))
    template = [None, *given()[1:]]
    assert NativeProgram.chain([(lambda inputs: inputs, (template, 0, [], []))]) is None
    with pytest.raises(RuntimeError, match="a program of 7 inputs was given 6"):
        NativeProgram.chain([(made, (template[:6], 0, [], []))])
    with pytest.raises(RuntimeError, match="hidden state at -1 of 7 inputs"):
        NativeProgram.chain([(made, (template, -1, [], []))])
    with pytest.raises(RuntimeError, match="place 7"):
        NativeProgram.chain([(made, (template, 0, [7], [0]))])
    run = NativeProgram.chain([(made, (template, 0, [], []))] * 2)
    with pytest.raises(RuntimeError, match="links 1 to 3 of 2"):
        run(1, [3], given()[0], [])
    first, second = run(0, [1, 2], given()[0], [])
    same_bits(run(1, [2], first, [])[0], second)
    # the state that was given, where nothing runs before it
    same_bits(run(0, [0, 1], given()[0], [])[0], given()[0])
