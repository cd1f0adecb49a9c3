"""Inductor's code for a segment as data: a straight line of calls, and the libraries it calls.

    buf0 = empty_strided_cpu((8, 576), (576, 1), torch.bfloat16)
    kernel_0(arg1_1, buf0)
    buf1 = torch.ops.eepass.linear_rows.default(buf0, [arg2_1], [None])
    return (buf1[0], )

Inductor writes such a program in Python, and each of its loops in C++, which ``loops.py`` builds.
The program is kept as text that holds nothing else than such lines: it is read as a tree, every
node of which must be of a known kind, before it runs.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping
from math import inf, nan
from pathlib import Path
from types import FunctionType
from typing import Any

import torch

from eepass.codegen.by_structure import Compiled
from eepass.codegen.loops import NAME, Loop, function
from eepass.private_names import dynamo_guards

NAMESPACES = ("aten", "prims", "eepass")
# what inductor calls besides operators and its kernels
FUNCTIONS: dict[str, Any] = {
    "empty_strided_cpu": dynamo_guards._empty_strided_cpu,
    "reinterpret_tensor": dynamo_guards._reinterpret_tensor,
    "device": torch.device,
}
EXTERN: dict[str, Any] = {
    "mm": torch.mm, "addmm": torch.addmm, "bmm": torch.bmm, "baddbmm": torch.baddbmm,
}  # fmt: skip
NUMBERS = {"inf": inf, "nan": nan}
# the names of loops
KERNEL = re.compile(NAME.format(r"\d+"))


class NotKept(ValueError):
    """A program of other lines than those above; the message shows what is foreign."""


def program_of(compiled: Compiled) -> tuple[str, list[str]]:
    """The program that ``compiled``, made by inductor with loops ``unbuilt``, runs, and the C++ of
    its loops: that of ``kernel_0`` first.

    Raises ``NotKept`` where it is more than such a program.
    """
    generated: Any = getattr(compiled, "__func__", None)
    if not isinstance(generated, FunctionType):
        raise NotKept(f"{type(compiled).__name__} is no generated function")
    scope = generated.__globals__
    text = Path(scope["__file__"]).read_text(encoding="utf-8")
    runner = next(node for node in ast.parse(text).body if isinstance(node, ast.ClassDef))
    call = next(n for n in runner.body if isinstance(n, ast.FunctionDef) and n.name == "call")
    renamed = _Shortened(scope)
    lines: list[ast.stmt] = [renamed.visit(line) for line in call.body]
    program = ast.unparse(ast.Module(lines, []))
    check_program(program)
    return program, renamed.sources


def run_program(program: str, library: Path | None) -> Compiled:
    """A program as a function again, with the library of its loops; raises ``NotKept`` or
    ``OSError``."""
    lines = check_program(program)
    text = ast.parse("def call(args): pass")
    definition: Any = text.body[0]
    definition.body = lines
    ast.fix_missing_locations(text)
    opened = {name: _opened(library, name) for name in set(KERNEL.findall(program))}
    scope = {"torch": torch, "extern_kernels": _Extern, **FUNCTIONS, **NUMBERS, **opened}
    # every node of it was looked at
    exec(compile(text, "<kept program>", "exec"), scope)
    call: Compiled = scope["call"]
    return call


def _opened(library: Path | None, name: str) -> Callable[..., None]:
    if library is None:
        raise NotKept(f"no library has {name}")
    return function(library, name)


def check_program(program: str) -> list[ast.stmt]:
    """The lines of ``program``; raises ``NotKept`` where one is foreign."""
    try:
        lines = ast.parse(program).body
    except (SyntaxError, ValueError) as error:
        raise NotKept(f"not a program: {error}") from error
    kernels = set(KERNEL.findall(program))
    known = _Known({"args", *FUNCTIONS, *NUMBERS, *kernels}, {*FUNCTIONS, *kernels})
    for line in lines[:-1]:
        known.statement(line)
    if not lines or not isinstance(lines[-1], ast.Return) or lines[-1].value is None:
        raise NotKept("it does not end by returning something")
    known.value(lines[-1].value)
    return lines


class _Extern:
    mm, addmm, bmm, baddbmm = (staticmethod(function) for function in EXTERN.values())


class _Shortened(ast.NodeTransformer):
    """Kernels are numbered; ``aten`` is ``torch.ops.aten``."""

    def __init__(self, scope: Mapping[str, Any]) -> None:
        self.scope = scope
        self.sources: list[str] = []
        self._names: dict[str, str] = {}

    def visit_Name(self, node: ast.Name) -> ast.AST:
        if node.id == "aten":
            return ast.parse("torch.ops.aten", mode="eval").body
        loop = self.scope.get(node.id)
        if not isinstance(loop, Loop):
            return node
        if node.id not in self._names:
            self._names[node.id] = NAME.format(len(self.sources))
            self.sources.append(loop.source)
        return ast.Name(self._names[node.id], node.ctx)


class _Known:
    """Refuses every node that is not of a kind listed here. ``names`` may be read, ``functions``
    called; what a line assigns may be read from then on."""

    def __init__(self, names: set[str], functions: set[str]) -> None:
        self.names, self.functions = names, functions
        self._fixed = frozenset(names)

    def statement(self, node: ast.stmt) -> None:
        match node:
            case ast.Assign(targets=[target], value=value):
                self.value(value)
                self._assign(target)
            case ast.Delete(targets=targets):
                for target in targets:
                    self.value(target)
            case ast.Expr(value=ast.Call()) if ast.unparse(node) == "args.clear()":
                pass
            case ast.Expr(value=ast.Call() as call):
                self.value(call)
            case _:
                raise _foreign(node)

    def value(self, node: ast.expr) -> None:
        match node:
            case ast.Constant(value=bool() | int() | float() | str() | None):
                pass
            case ast.Name(id=name) if name in self.names:
                pass
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                self.value(operand)
            case ast.Tuple(elts=items) | ast.List(elts=items):
                for item in items:
                    self.value(item)
            case ast.Subscript(value=value, slice=ast.Constant(value=int())):
                self.value(value)
            case ast.Attribute(value=ast.Name(id="torch"), attr=attribute):
                if not isinstance(getattr(torch, attribute, None), torch.dtype | torch.layout):
                    raise _foreign(node)
            case ast.Call(func=function, args=arguments, keywords=named):
                if not self._may_call(ast.unparse(function)):
                    raise _foreign(node)
                for argument in (*arguments, *(keyword.value for keyword in named)):
                    self.value(argument)
            case _:
                raise _foreign(node)

    def _may_call(self, name: str) -> bool:
        parts = name.split(".")
        if len(parts) == 2 and parts[0] == "extern_kernels":
            return parts[1] in EXTERN
        if len(parts) == 5 and parts[:2] == ["torch", "ops"]:
            return parts[2] in NAMESPACES
        return name in self.functions

    def _assign(self, target: ast.expr) -> None:
        match target:
            case ast.Name(id=name) if name.isidentifier() and name not in self._fixed:
                self.names.add(name)
            case ast.Tuple(elts=items):
                for item in items:
                    self._assign(item)
            case _:
                raise _foreign(target)


def _foreign(node: ast.AST) -> NotKept:
    return NotKept(f"foreign to a kept program: {ast.unparse(node)[:120]}")
