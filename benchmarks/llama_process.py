"""llama.cpp in another process (``llama_worker``), as a system that is measured in turns."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from eepass.errors import InputError

WORKER = Path(__file__).with_name("llama_worker.py")


class LlamaProcess:
    """llama.cpp with a GGUF file; ``info``: what it uses of the processor.

    ``length``: tokens there is room for. ``context``: tokens of text before the rows of a pass.
    ``folder``: where another build of llama-cpp-python lies than the one installed. Raises
    ``InputError`` where it cannot load, fails or ends, saying why.
    """

    def __init__(
        self, file: Path, threads: int, length: int, context: int, folder: Path | None = None
    ) -> None:
        self.context = context
        if folder is not None and not (folder / "llama_cpp").is_dir():
            raise InputError(f"{folder}: no llama_cpp in it (pip install --target)")
        paths = [str(folder)] if folder is not None else []
        paths += filter(None, [os.environ.get("PYTHONPATH")])
        self.process = subprocess.Popen(
            [sys.executable, str(WORKER), str(file), str(threads), str(length)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )  # fmt: skip
        self.info = str(self._answer()["ready"])

    def passes(self, rows: int, count: int) -> list[float]:
        return self._ask(rows=rows, after=self.context, count=count)

    def prefill(self, tokens: int) -> float:
        return self._ask(prefill=tokens)[0]

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        # it ends with its input, if it has not already
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()

    def _ask(self, **request: int) -> list[float]:
        assert self.process.stdin is not None
        # that it has ended is seen when its answer is read
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        seconds: list[float] = self._answer()["seconds"]
        return seconds

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise InputError(f"llama.cpp's process ended with status {self.process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise InputError(answer["error"])
        return answer
