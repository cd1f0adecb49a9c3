"""Keep what inductor made of a segment, so that the next process neither lowers nor compiles it."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import cache, partial
from pathlib import Path
from typing import Protocol

from torch import Tensor
from torch.fx import GraphModule

from eepass.codegen.by_structure import ByStructure, Compiled
from eepass.codegen.cpu.native import load_kernels
from eepass.codegen.kept_program import NotKept, program_of
from eepass.codegen.loops import build
from eepass.codegen.native_program import NativeProgram, runnable
from eepass.segments import GraphToMake

PROGRAM = "program.py.txt"
LIBRARY = "loops.so"


class Store(Protocol):
    """Where entries are kept, by key: files by name."""

    def find(self, key: str) -> Path | None: ...

    def write(self, key: str, files: Mapping[str, bytes]) -> None: ...

    def drop(self, key: str) -> None: ...


class KeepingCompiler:
    """Stands in for a compiler, which is made and imported when a segment is not kept yet.

    ``environment``: what compiled code depends on besides its graph, as text. ``compiler`` makes a
    ``CpuCompiler``; ``kernels_missing`` is as it has it.
    """

    def __init__(self, store: Store, environment: str, compiler: Callable[[], ByStructure]) -> None:
        self.store, self.environment = store, environment
        self.kernels_missing = load_kernels()
        self._compiler = cache(compiler)
        self._compiled: dict[str, Compiled] = {}

    def __call__(
        self,
        graph: GraphModule | GraphToMake,
        structure: str,
        examples: Sequence[Tensor],
        *,
        logits: bool = False,
    ) -> Compiled:
        """As ``ByStructure`` is called."""
        shapes = [(tuple(x.shape), tuple(x.stride()), str(x.dtype)) for x in examples]
        text = repr((self.environment, self.kernels_missing, structure, shapes, logits))
        key = "code-" + hashlib.sha256(text.encode()).hexdigest()[:32]
        if key not in self._compiled:
            self._compiled[key] = self._kept(key) or self._made(
                key, lambda: self._compiler()(graph, structure, examples, logits=logits)
            )
        return self._compiled[key]

    def _made(self, key: str, compile: Callable[[], Compiled]) -> Compiled:
        made = compile()
        # code of another form is compiled at each start
        with contextlib.suppress(NotKept):
            if isinstance(made, NativeProgram):
                program, library = made.program, made.library
            else:
                program, sources = program_of(made)
                library = build(sources) if sources else None
            if library is None:
                self._write(key, program, None)
            else:
                library.add_done_callback(partial(self._write, key, program))
        return made

    def _write(self, key: str, program: str, library: Future[Path] | None) -> None:
        # where the compiler refused it, the first call says so
        if library is not None and library.exception():
            return
        with contextlib.suppress(OSError):
            code = {} if library is None else {LIBRARY: library.result().read_bytes()}
            self.store.write(key, {PROGRAM: program.encode(), **code})

    def _kept(self, key: str) -> Compiled | None:
        entry = self.store.find(key)
        if entry is None:
            return None
        try:
            library = entry / LIBRARY
            program = (entry / PROGRAM).read_text(encoding="utf-8")
            return runnable(program, library if library.exists() else None)
        except (NotKept, OSError):
            self.store.drop(key)
            return None
