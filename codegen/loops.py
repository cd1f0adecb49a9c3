"""The loops of a segment, which inductor writes in C++: built as one library, in the background.

Inductor builds a library of each loop and waits for all of them. Reading the headers takes most of
the time, so here a segment's loops are one library, and it is built while the next segment is
lowered. Inductor is imported when there is something to build: a second start does without.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, cached_property
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

# what inductor calls the function of a loop, and what it is called in a library of several
ENTRY = re.compile(r'(extern\s+"C"\s+void\s+)kernel(?=\()')
NAME = "kernel_{}"
# The instruction sets a processor names are taken as they are: the compiler built eepass's own
# kernels for them. Inductor would compile a program for each and run it, which takes five seconds.
KNOWN_PROCESSOR = {"cpp.vec_isa_ok": True}


class Loop:
    """A loop in inductor's code that is not built; when it is called all the same, by code that is
    no kept program, it is built alone."""

    def __init__(self, source: str) -> None:
        self.source = source

    def __call__(self, *arguments: Any) -> None:
        self._function(*arguments)

    @cached_property
    def _function(self) -> Callable[..., None]:
        return function(build([self.source]).result(), NAME.format(0))


@contextmanager
def unbuilt() -> Iterator[None]:
    """Within, the code that inductor makes or reads again has ``Loop`` objects for its loops."""
    from eepass.private_names import AsyncCompile

    built = AsyncCompile.cpp_pybinding
    AsyncCompile.cpp_pybinding = lambda _self, _types, source: Loop(source)
    try:
        yield
    finally:
        AsyncCompile.cpp_pybinding = built


def read_headers() -> None:
    """Let the compiler read what all loops include, where it has not done so before."""
    _library(together([]))


def build(sources: Sequence[str]) -> Future[Path]:
    """The library of loops ``sources``, of which number i is called ``kernel_i``.

    The future raises torch's ``CppCompileError`` where the compiler refuses them.
    """
    return _build(together(sources))


def function(library: Path, name: str) -> Callable[..., None]:
    """A loop of ``library`` as a function of tensors and numbers, for Python."""
    entry = ctypes.CDLL(str(library))[name]
    entry.restype = None

    def call(*arguments: Tensor | float) -> None:
        entry(*map(_as_in_c, arguments))

    return call


def _as_in_c(argument: Tensor | float) -> Any:
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    return (ctypes.c_double if isinstance(argument, float) else ctypes.c_int64)(argument)


def address(library: ctypes.CDLL, name: str) -> int:
    """Where a loop lies in memory; raises ``OSError`` where ``library`` has none of that name."""
    try:
        return ctypes.cast(library[name], ctypes.c_void_p).value or 0
    except AttributeError as error:
        raise OSError(f"{library._name} has no {name}") from error


def together(sources: Sequence[str]) -> str:
    """One C++ text of loops, each in a namespace of its own: they may define the same helpers."""
    lines = [line for source in sources for line in source.splitlines()]
    includes = dict.fromkeys(line for line in lines if line.startswith("#include"))
    parts = [*includes]
    for number, source in enumerate(sources):
        name = NAME.format(number)
        body = "\n".join(x for x in source.splitlines() if not x.startswith("#include"))
        body, found = ENTRY.subn(rf"\g<1>{name}", body)
        if found != 1:
            raise ValueError(f"a loop defines {found} functions")
        parts += [f"namespace {name}_ {{", body, "}"]
    return "\n".join(parts) + "\n"


@cache
def _build(text: str) -> Future[Path]:
    return _builders().submit(_library, text)


@cache
def _builders() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(len(os.sched_getaffinity(0)), "loops")


def _library(text: str) -> Path:
    from eepass.private_names import inductor_config

    # what is patched elsewhere holds for one thread
    with inductor_config.patch(KNOWN_PROCESSOR):
        return Path(_libraries().load_async(text, "cpu")()._name)


@cache
def _libraries() -> Any:
    """Inductor's cache of libraries, in which these are no modules of Python."""
    from eepass.private_names import CppPythonBindingsCodeCache

    class Libraries(CppPythonBindingsCodeCache):
        cache: ClassVar[dict[str, Any]] = {}

        @classmethod
        def _load_library_inner(cls, path: str, key: str) -> ctypes.CDLL:
            return ctypes.CDLL(path)

    return Libraries
