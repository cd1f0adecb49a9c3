"""Operators with given outputs: the same values, nothing allocated, wrong outputs refused."""

import pytest
import torch
from kernel_cases import Case, exit_case, fill_case, same, verify_case

import eepass.ops.into  # noqa: F401
from eepass.ops import fused


def draft_case(rows=2):
    case = Case()
    return [case.random(rows, 16), *case.head(90, 16, bias=True), None, 6, 1.0, 0.0]


CASES = {
    "exit_predictor": lambda: exit_case(rows=2, hidden=70, rank=3),
    "verify_head": lambda: verify_case(rows=2, hidden=40, vocabulary=100, rank=3),
    "draft_topk": draft_case,
}
each_operator = pytest.mark.parametrize("name", CASES)


def buffers_of(name, arguments):
    """Outputs for the caller to give, filled with what no kernel writes."""
    from eepass.ops.into import OUTPUTS

    values = getattr(fused, name)(*arguments)
    made = [torch.empty(value.shape, dtype=value.dtype) for value in values]
    buffers = dict(zip(OUTPUTS[name], made, strict=True))
    for buffer in buffers.values():
        buffer.fill_(float("nan") if buffer.is_floating_point() else 1)
    return buffers, values


def operator(name):
    return getattr(torch.ops.eepass, name).into


@pytest.fixture
def kernels(interpreter):
    """Operators on the CPU go through the kernels, in the interpreter."""
    from eepass.codegen.kernels.register import register_kernels, unregister_kernels

    register_kernels(key="CPU")
    yield
    unregister_kernels("CPU")


def workspace_for(name, arguments):
    from eepass.codegen.kernels.register import workspace_bytes

    return torch.empty(workspace_bytes(name, *arguments), dtype=torch.uint8)


@each_operator
def test_the_reference_implementation(name):
    arguments = CASES[name]()
    buffers, values = buffers_of(name, arguments)
    operator(name)(*arguments, **buffers, workspace=torch.empty(0, dtype=torch.uint8))
    assert all(torch.equal(b, v) for b, v in zip(buffers.values(), values, strict=True))


@each_operator
def test_the_kernels_write_there_and_allocate_nothing(name, kernels, monkeypatch):
    arguments = CASES[name]()
    buffers, values = buffers_of(name, arguments)
    workspace = workspace_for(name, arguments)
    # as an earlier step may have left it
    workspace.fill_(255)
    with monkeypatch.context() as patch:
        from eepass.codegen.kernels import launch

        def refuse(*shape, **options):
            raise AssertionError("allocated")

        patch.setattr(launch.torch, "empty", refuse)
        for _ in range(2):
            operator(name)(*arguments, **buffers, workspace=workspace)
    same(buffers.values(), values)


def test_counters_are_ready_each_time(kernels, monkeypatch):
    """Where a row is divided without a translator, no earlier kernel sets them to 0."""
    from eepass.codegen.kernels import final_state

    monkeypatch.setattr(final_state, "WIDE_SLICE", 32)
    arguments = exit_case(rows=2, hidden=100)
    buffers, values = buffers_of("exit_predictor", arguments)
    workspace = workspace_for("exit_predictor", arguments).fill_(255)
    for _ in range(2):
        for buffer in buffers.values():
            buffer.zero_()
        operator("exit_predictor")(*arguments, **buffers, workspace=workspace)
        same(buffers.values(), values)


def test_rows_that_are_not_contiguous_go_through_the_workspace(kernels):
    arguments = exit_case(rows=3, hidden=40)
    arguments[0] = arguments[0].t().contiguous().t()
    arguments[9] = arguments[9].t().contiguous().t()
    buffers, values = buffers_of("exit_predictor", arguments)
    operator("exit_predictor")(
        *arguments, **buffers, workspace=workspace_for("exit_predictor", arguments)
    )
    same(buffers.values(), values)


@each_operator
def test_what_does_not_fit_is_named(name, kernels):
    arguments = CASES[name]()
    buffers, _ = buffers_of(name, arguments)
    workspace = workspace_for(name, arguments)
    first = next(iter(buffers))
    for wrong in (buffers[first][:1], buffers[first].double()):
        given = {**buffers, first: wrong}
        with pytest.raises(ValueError, match=f"{first}: .* expected"):
            operator(name)(*arguments, **given, workspace=workspace)
    with pytest.raises(ValueError, match=r"workspace: \d+ bytes are too few"):
        operator(name)(*arguments, **buffers, workspace=workspace[:-16])
    with pytest.raises(ValueError, match=r"expected plain torch\.uint8"):
        operator(name)(*arguments, **buffers, workspace=workspace.float())


def test_keys_and_values_from_a_table(kernels):
    from eepass.codegen.kernels.fill_kv import pointer_table

    found, expected = fill_case(rows=2), fill_case(rows=2)
    table = pointer_table(*found[1:11])
    torch.ops.eepass.fill_kv.table(*found, table)
    fused.fill_kv(*expected)
    for caches, wanted in zip(found[9:11], expected[9:11], strict=True):
        same(caches, wanted)
    # where it writes is what the table says
    elsewhere = fill_case(rows=2)
    torch.ops.eepass.fill_kv.table(*elsewhere, table.zero_().copy_(pointer_table(*found[1:11])))
    assert not elsewhere[9][0].any()


@each_operator
def test_as_torch_wants_operators(name):
    arguments = CASES[name]()
    buffers, _ = buffers_of(name, arguments)
    torch.library.opcheck(
        operator(name),
        tuple(arguments),
        {**buffers, "workspace": torch.zeros(16, dtype=torch.uint8)},
        test_utils=("test_schema", "test_faketensor"),
    )


def test_a_table_as_torch_wants_it():
    torch.library.opcheck(
        torch.ops.eepass.fill_kv.table,
        (*fill_case(), torch.zeros(2, 2, 12, dtype=torch.long)),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_kernels_are_what_runs_once_registered(interpreter, monkeypatch):
    from eepass.codegen.kernels import register

    arguments, seen = exit_case(hidden=40), []
    monkeypatch.setattr(register, "run", lambda made, compiled: seen.extend(made))
    register.register_kernels(key="CPU")
    torch.ops.eepass.exit_predictor(*arguments)
    assert [launch.name for launch in seen] == ["_exit_kernel"]
    register.unregister_kernels("CPU")
    same(torch.ops.eepass.exit_predictor(*arguments), fused.exit_predictor(*arguments))
    assert len(seen) == 1


def test_compiled_kernels_are_taken_first(interpreter):
    from eepass.codegen.kernels import register

    class Compiled:
        def __init__(self):
            self.requested = []

        def launch(self, launch):
            self.requested.append(launch.name)
            return False

    compiled, arguments = Compiled(), exit_case(hidden=40, rank=3)
    register.register_kernels(compiled, key="CPU")
    found = torch.ops.eepass.exit_predictor(*arguments)
    register.unregister_kernels("CPU")
    assert compiled.requested == ["_gate_kernel", "_exit_kernel"]
    same(found, fused.exit_predictor(*arguments))
