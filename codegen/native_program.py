"""Run a kept program without Python: its lines as steps of ``cpu/program.cpp``.

In Python each line costs microseconds: half of the time of a small model's layer.
"""

from __future__ import annotations

import ast
import ctypes
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eepass.codegen.by_structure import Compiled
from eepass.codegen.cpu.native import load_kernels
from eepass.codegen.kept_program import (
    KERNEL,
    NotKept,
    check_program,
    program_of,
    run_program,
)
from eepass.codegen.loops import address, build
from eepass.segments import ChainedLayers, Link

# kinds of arguments, as in `cpu/program.cpp`
REGISTER, NONE, INTEGER, BOOLEAN, REAL, TENSORS, MAYBE_TENSORS, INTEGERS = range(8)
MOST_ARGUMENTS = 64

# a method of ``eepass::Program`` and its arguments
Step = tuple[str, tuple[Any, ...]]
Registers = tuple[int, int, list[int]]


class NotNative(ValueError):
    """A program with a line that has no native form; the message shows it."""


class NativeProgram:
    """``program``, as ``kept_program`` defines it, as one native call. ``library``: of its loops,
    which may still be built; the first call waits for it."""

    def __init__(
        self, program: str, library: Future[Path] | None, translation: _Translation
    ) -> None:
        self.program, self.library, self._translation = program, library, translation

    def __call__(self, inputs: list[Tensor]) -> Sequence[Tensor]:
        found: Sequence[Tensor] = self.native.run(inputs)
        return found

    @cached_property
    def native(self) -> Any:
        """The ``eepass::Program``; raises ``OSError`` where the library has not all loops."""
        inputs, count, outputs = self._translation.registers_used
        made = torch.classes.eepass.Program(inputs, count)
        loops = None if self.library is None else ctypes.CDLL(str(self.library.result()))
        for method, arguments in self._translation.steps:
            if method == "loop" and loops is not None:
                name, *rest = arguments
                arguments = (address(loops, name), *rest)
            getattr(made, method)(*arguments)
        made.give_back(outputs)
        return made

    @staticmethod
    def chain(layers: Sequence[tuple[Compiled, Link]]) -> ChainedLayers | None:
        """``layers`` as one native call; None where one is no ``NativeProgram``."""
        made = torch.classes.eepass.Chain()
        for compiled, link in layers:
            if not isinstance(compiled, NativeProgram):
                return None
            made.add(compiled.native, *link)
        run: ChainedLayers = made.run
        return run


def natively(compiled: Compiled) -> Compiled:
    """What inductor made, as a ``NativeProgram`` where it has that form, else as it is."""
    with suppress(NotKept, NotNative):
        program, sources = program_of(compiled)
        return native_program(program, build(sources) if sources else None)
    return compiled


def runnable(program: str, library: Path | None) -> Compiled:
    """``program`` as a function: natively where it has that form, else line by line in Python.

    Raises ``NotKept`` or ``OSError`` where it cannot run.
    """
    with suppress(NotNative):
        made = native_program(program, None if library is None else _ready(library))
        # a library that is no longer whole shows here and not in the middle of an answer
        made.native  # noqa: B018
        return made
    return run_program(program, library)


def native_program(program: str, library: Future[Path] | None) -> NativeProgram:
    """Raises ``NotNative`` where a line has no native form, or there are no C++ kernels."""
    if missing := load_kernels():
        raise NotNative(missing)
    translation = _Translation(check_program(program))
    if library is None and any(method == "loop" for method, _ in translation.steps):
        raise NotKept("a program calls loops and has no library of them")
    return NativeProgram(program, library, translation)


def _ready(library: Path) -> Future[Path]:
    found: Future[Path] = Future()
    found.set_result(library)
    return found


class _Translation:
    """``lines`` as the steps of an ``eepass::Program``, loops by name; ``registers_used``: how many
    inputs there are, how many registers, and which of these are the outputs."""

    def __init__(self, lines: Sequence[ast.stmt]) -> None:
        self.lines = lines
        self.registers: dict[str, int] = {}
        self.count = 0
        self.steps: list[Step] = []
        self.registers_used = self._translate()

    def _translate(self) -> Registers:
        inputs = 0
        for line in self.lines[:-1]:
            match line:
                case ast.Assign(targets=[ast.Tuple(elts=names)], value=ast.Name(id="args")):
                    inputs = len(names)
                    for name in names:
                        self._name(name)
                case ast.Assign(targets=[ast.Name() as name], value=value):
                    self.registers[name.id] = self._value(value)
                case ast.Delete(targets=names):
                    for name in names:
                        self._forget(name)
                case ast.Expr(value=ast.Call(func=ast.Attribute(attr="clear"))):
                    pass
                case ast.Expr(value=ast.Call() as call):
                    self._call(call)
                case _:
                    raise _not_native(line)
        result: Any = self.lines[-1]
        if not isinstance(result.value, ast.Tuple):
            raise _not_native(result)
        outputs = [self._value(item) for item in result.value.elts]
        return inputs, self.count, outputs

    def _new(self) -> int:
        self.count += 1
        return self.count - 1

    def _name(self, node: ast.expr) -> None:
        if not isinstance(node, ast.Name):
            raise _not_native(node)
        self.registers[node.id] = self._new()

    def _forget(self, node: ast.expr) -> None:
        register = self._register(node)
        del self.registers[ast.unparse(node)]
        # another name may stand for the same tensor
        if register not in self.registers.values():
            self.steps.append(("free", (register,)))

    def _register(self, node: ast.expr) -> int:
        if not isinstance(node, ast.Name) or node.id not in self.registers:
            raise _not_native(node)
        return self.registers[node.id]

    def _value(self, node: ast.expr) -> int:
        """The register that holds what ``node`` is."""
        match node:
            case ast.Name():
                return self._register(node)
            case ast.Subscript(value=value, slice=ast.Constant(value=int(index))):
                source, to = self._value(value), self._new()
                self.steps.append(("item", (to, source, index)))
                return to
            case ast.Call():
                return self._call(node)
        raise _not_native(node)

    def _call(self, node: ast.Call) -> int:
        name = ast.unparse(node.func)
        if name.startswith("extern_kernels."):
            # a matrix product of a library, into a tensor that is there
            name = f"torch.ops.aten.{name.partition('.')[2]}.out"
        to = self._new()
        if name == "empty_strided_cpu":
            sizes, strides, dtype = node.args
            kind = getattr(torch, ast.unparse(dtype).removeprefix("torch."))
            self.steps.append(("empty", (to, _numbers(sizes), _numbers(strides), kind)))
        elif name == "reinterpret_tensor":
            source, sizes, strides, offset = node.args
            view = (self._value(source), _numbers(sizes), _numbers(strides), _number(offset))
            self.steps.append(("view", (to, *view)))
        elif KERNEL.fullmatch(name):
            self.steps.append(("loop", (name, self._loop_arguments(node))))
        elif name.startswith("torch.ops."):
            _, _, namespace, operator, overload = name.split(".")
            code, reals = self._operator_arguments(node, name)
            overload = "" if overload == "default" else overload
            self.steps.append(("call", (to, f"{namespace}::{operator}", overload, code, reals)))
        else:
            raise _not_native(node)
        return to

    def _loop_arguments(self, node: ast.Call) -> list[int]:
        code: list[int] = []
        for argument in node.args:
            match argument:
                case ast.Constant(value=int(number)) if not isinstance(number, bool):
                    code += [INTEGER, number]
                case ast.Constant():
                    raise _not_native(node)
                case _:
                    code += [REGISTER, self._value(argument)]
        if len(code) > 2 * MOST_ARGUMENTS or node.keywords:
            raise _not_native(node)
        return code

    def _operator_arguments(self, node: ast.Call, name: str) -> tuple[list[int], list[float]]:
        schema = _operator(name)._schema
        given: list[Any] = list(node.args)
        by_name = {keyword.arg: keyword.value for keyword in node.keywords}
        code: list[int] = []
        reals: list[float] = []
        for place, argument in enumerate(schema.arguments):
            if place < len(given):
                value = given[place]
            elif argument.name in by_name:
                value = by_name[argument.name]
            else:
                value = ast.parse(repr(argument.default_value), mode="eval").body
            code += self._argument(value, str(argument.type), reals)
        return code, reals

    def _argument(self, node: Any, kind: str, reals: list[float]) -> list[int]:
        if kind.startswith("Optional[") and not isinstance(node, ast.Constant):
            kind = kind[len("Optional[") : -1]
        match node:
            case ast.Constant(value=None):
                return [NONE]
            case ast.Constant(value=bool(flag)):
                return [BOOLEAN, int(flag)]
            case ast.Constant(value=int(number)) if "float" not in kind:
                return [INTEGER, number]
            case ast.Constant(value=int() | float() as number):
                reals.append(float(number))
                return [REAL, len(reals) - 1]
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
                return self._argument(ast.Constant(-number), kind, reals)
            case ast.Tuple() | ast.List():
                return self._list(node, kind)
            case ast.Name() | ast.Call() | ast.Subscript():
                return [REGISTER, self._value(node)]
        raise _not_native(node)

    def _list(self, node: ast.Tuple | ast.List, kind: str) -> list[int]:
        if kind == "List[int]":
            return [INTEGERS, len(node.elts), *_numbers(node)]
        if kind not in ("List[Tensor]", "List[Optional[Tensor]]"):
            raise _not_native(node)
        registers = [
            -1 if isinstance(item, ast.Constant) and item.value is None else self._value(item)
            for item in node.elts
        ]
        marker = TENSORS if kind == "List[Tensor]" else MAYBE_TENSORS
        return [marker, len(registers), *registers]


def _operator(name: str) -> Any:
    _, _, namespace, operator, overload = name.split(".")
    return getattr(getattr(getattr(torch.ops, namespace), operator), overload)


def _numbers(node: ast.expr) -> list[int]:
    if not isinstance(node, (ast.Tuple, ast.List)):
        raise _not_native(node)
    return [_number(item) for item in node.elts]


def _number(node: ast.expr) -> int:
    match node:
        case ast.Constant(value=int(number)):
            return number
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int(number))):
            return -number
    raise _not_native(node)


def _not_native(node: ast.AST) -> NotNative:
    return NotNative(f"no native form: {ast.unparse(node)[:120]}")
