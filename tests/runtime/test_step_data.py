"""A step that contradicts itself is found: by its data alone, or when the interpreter runs it."""

from dataclasses import replace

import pytest
import torch
from steps import LateFlags

from eepass.runtime.step.data import (
    Buffer,
    Conditional,
    Launch,
    Step,
    StepError,
    blocks,
    check_step,
    flag_writers,
)
from eepass.runtime.step.host import HostDriven, called
from eepass.runtime.step.interpret import Interpreter


def small_step(items=None, **changes):
    """Doubles x into y; where ``flag`` is set adds one."""
    memory = torch.zeros(16)
    tensors = {
        "x": (memory[0:4], "kept"), "y": (memory[4:8], "step"), "z": (memory[8:12], "step"),
    }  # fmt: skip
    tensors |= {"flag": (torch.zeros(1, dtype=torch.bool), "kept")} | changes
    buffers = {name: Buffer(name, tensor, life) for name, (tensor, life) in tensors.items()}
    return Step(buffers, tuple(items or (DOUBLE, ADD, COPY)), torch.zeros(1), {})


def write(name, value):
    return lambda b: b[name].copy_(value(b))


DOUBLE = Launch("double", write("y", lambda b: 2 * b["x"]), ("x",), ("y",))
ADD = Conditional("flag", (Launch("add", write("y", lambda b: b["y"] + 1), ("y",), ("y",)),))
COPY = Launch("copy", write("x", lambda b: b["y"]), ("y",), ("x",))


@pytest.mark.parametrize("flag, expected", ((False, 12.0), (True, 15.0)))
def test_a_sound_step_runs(flag, expected):
    step = small_step()
    step["x"].fill_(3.0)
    step["flag"].fill_(flag)
    interpreter = Interpreter(step)
    for _ in range(2):
        interpreter.step()
    assert step["x"].tolist() == [expected] * 4
    assert interpreter.ran == (["double", "add", "copy"] if flag else ["double", "copy"])


@pytest.mark.parametrize(
    "items, message",
    (
        ((COPY, DOUBLE), "copy reads y before anything wrote it"),
        ((replace(DOUBLE, reads=("u",)),), "reads u, which is no buffer"),
        ((replace(DOUBLE, writes=("u",)),), "writes u, which is no buffer"),
        ((DOUBLE, Conditional("x", (COPY,))), "x is no flag"),
        ((Conditional("flag", (DOUBLE,)), COPY), "copy reads y before anything wrote it"),
        ((DOUBLE, Conditional("z", (COPY,))), "the conditional on z reads z before"),
    ),
)  # fmt: skip
def test_contradictory_data_are_refused(items, message):
    with pytest.raises(StepError, match=message):
        check_step(small_step(items))


def test_buffers_that_overlap_are_found():
    memory = torch.zeros(8)
    with pytest.raises(StepError, match="overlap"):
        check_step(small_step(x=(memory[0:4], "kept"), y=(memory[3:7], "step")))


def test_a_weight_in_a_buffers_memory_is_found():
    step = small_step()
    step.constants = {"w": step["x"][1:2], "tied": step["x"][1:2]}
    with pytest.raises(StepError, match="overlap"):
        check_step(step)
    tied = torch.ones(3)
    step.constants = {"w": tied, "tied": tied}
    check_step(step)


def test_a_part_lies_within_its_whole():
    step = small_step()
    step.buffers["part"] = Buffer("part", step["x"][1:3], "kept", base="x")
    check_step(step)
    step.buffers["part"] = Buffer("part", step["y"][1:3], "kept", base="x")
    with pytest.raises(StepError, match="part does not lie within x"):
        check_step(step)


def also_writes_z(b, hidden):
    b["y"].copy_(b["x"])
    hidden.zero_()


@pytest.mark.parametrize(
    "launch, message",
    (
        (lambda s: replace(DOUBLE, run=lambda b: also_writes_z(b, s["z"])), "double writes z"),
        (lambda s: replace(DOUBLE, run=lambda b: None), "leaves y unwritten"),
        (lambda s: replace(DOUBLE, run=lambda b: b["y"][:2].zero_()), "leaves y unwritten"),
        # y is declared as written whole, and is read first
        (lambda s: replace(DOUBLE, run=lambda b: b["y"].mul_(2)), "double leaves y unwritten"),
    ),
    ids=("undeclared write", "nothing written", "half written", "undeclared read"),
)
def test_a_launch_that_differs_from_its_declaration_is_found(launch, message):
    step = small_step()
    step["x"].fill_(1.0)
    step["z"].fill_(5.0)
    step.items = (launch(step), COPY)
    with pytest.raises(StepError, match=message):
        Interpreter(step).step()


def test_a_launch_gets_the_buffers_it_declares_alone():
    step = small_step((replace(DOUBLE, run=lambda b: b["z"].zero_()), COPY))
    with pytest.raises(KeyError):
        Interpreter(step).step()


def test_a_buffer_that_moves_is_found():
    step = small_step()
    interpreter = Interpreter(step)
    interpreter.step()
    step["x"].set_(torch.ones(4))
    with pytest.raises(StepError, match="x: no longer at the address of the capture"):
        interpreter.step()


def test_a_weight_that_moves_is_found():
    step = small_step()
    step.constants = {"w": torch.ones(3)}
    interpreter = Interpreter(step)
    step.constants["w"].data = torch.ones(3)
    with pytest.raises(StepError, match="constant w: no longer"):
        interpreter.step()


def test_flags_are_read_in_the_order_of_the_step():
    """A flag set after its conditional is another step than one set before."""
    raise_flag = Launch("raise", write("flag", lambda b: b["x"][:1] > 0), ("x",), ("flag",))
    for items, expected in (
        ((raise_flag, DOUBLE, ADD, COPY), 3.0),
        ((DOUBLE, ADD, raise_flag, COPY), 2.0),
    ):
        step = small_step(items)
        step["x"].fill_(1.0)
        Interpreter(step).step()
        assert step["x"][0] == expected


def test_blocks_hold_consecutive_launches():
    step = small_step((DOUBLE, COPY, ADD, DOUBLE, COPY))
    assert blocks(step.items) == [(DOUBLE, COPY), ADD, (DOUBLE, COPY)]
    assert blocks(step.items, {DOUBLE}) == [(DOUBLE,), (COPY,), ADD, (DOUBLE,), (COPY,)]
    writer = replace(DOUBLE, writes=("y", "flag"))
    assert flag_writers(small_step((writer, ADD, COPY))) == {writer}


def test_a_flag_of_the_step_before_launches_nothing_ahead():
    """A body is launched ahead only by a flag of this step; else the host waits for the flag."""
    flags = torch.zeros(1, dtype=torch.bool)
    tell = Launch("tell", write("flag", lambda b: b["x"][:1] > 0), ("x",), ("flag",))
    add = Launch("add", write("x", lambda b: b["x"] + 1), ("x",), ("x",))
    step = small_step((tell, Conditional("flag", (add,), ahead=True)), flag=(flags, "step"))
    step.flags = flags
    late = LateFlags(flags)
    executor = HostDriven(step, late, called(step))
    for before, after in ((1.0, 2.0), (-5.0, -5.0), (3.0, 4.0)):
        step["x"].fill_(before)
        executor.step()
        assert step["x"][0] == after
    assert late.synchronisations == 3
