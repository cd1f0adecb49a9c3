"""llama.cpp in a process of its own, which times passes and prompts when told to.

    python benchmarks/llama_worker.py MODEL.gguf THREADS LENGTH

Two engines in one process disturb one another: each has threads that spin for a while when they
have nothing to do. Here they spin in another process, and sleep while it waits for its turn.

Standard output has a line of JSON when the model is loaded, ``{"ready": what llama.cpp uses}``,
and one for each line of standard input. ``{"rows": n, "after": c, "count": k}`` wants ``k`` passes
of ``n`` tokens after ``c`` others, with the logits of all ``n``; ``{"prefill": n}`` a prompt of
``n`` tokens with the logits of the last. The answer is ``{"seconds": [...]}`` or
``{"error": why}``.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from time import perf_counter
from typing import Any, TextIO

UBATCH = 512


class LlamaContext:
    """A model with room for ``length`` tokens; ``RuntimeError`` where it cannot be loaded."""

    def __init__(self, llama: Any, file: str, threads: int, length: int) -> None:
        self.llama, self.length = llama, length
        # what it reports while loading is not for whoever reads the figures
        self.silent = llama.llama_log_callback(lambda level, text, data: None)
        llama.llama_log_set(self.silent, None)
        llama.llama_backend_init()
        model = llama.llama_model_load_from_file(file.encode(), llama.llama_model_default_params())
        if not model:
            raise RuntimeError(f"{file}: llama.cpp cannot load it")
        options = llama.llama_context_default_params()
        options.n_ctx = options.n_batch = length
        options.n_ubatch = UBATCH
        options.n_threads = options.n_threads_batch = threads
        self.context = llama.llama_init_from_model(model, options)
        if not self.context:
            raise RuntimeError(f"{file}: llama.cpp has no context of {length} tokens for it")
        self.memory = llama.llama_get_memory(self.context)
        self.batch = llama.llama_batch_init(length, 0, 1)
        self.held = 0

    def rows(self, rows: int, after: int, count: int) -> list[float]:
        """Seconds of ``count`` passes of ``rows`` tokens after ``after`` others."""
        if after > self.held:
            self._start_over()
            self._decode(after, 0, every=False)
            self.held = after
        times = []
        for _ in range(count):
            self.llama.llama_memory_seq_rm(self.memory, 0, after, -1)
            self.held = after
            times.append(self._decode(rows, after, every=True))
        return times

    def prefill(self, tokens: int) -> list[float]:
        """Seconds of a prompt of ``tokens`` tokens."""
        self._start_over()
        return [self._decode(tokens, 0, every=False)]

    def _start_over(self) -> None:
        self.llama.llama_memory_clear(self.memory, True)
        self.held = 0

    def _decode(self, count: int, first: int, every: bool) -> float:
        """Seconds of ``count`` tokens from position ``first`` on; logits of all or of the last."""
        batch = self.batch
        if first + count > self.length:
            raise RuntimeError(f"{first + count} tokens, and room for {self.length}")
        batch.n_tokens = count
        for index in range(count):
            batch.token[index] = (7 + 13 * index) % 97
            batch.pos[index] = first + index
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
            batch.logits[index] = every or index == count - 1
        began = perf_counter()
        failed = self.llama.llama_decode(self.context, batch)
        self.llama.llama_synchronize(self.context)
        seconds = perf_counter() - began
        if failed:
            raise RuntimeError(f"llama_decode of {count} tokens returned {failed}")
        return seconds


def load(file: str, threads: int, length: int) -> tuple[LlamaContext, str]:
    """The model, and what llama.cpp says it uses of this processor."""
    try:
        import llama_cpp
    except ImportError as error:
        missing = f"llama.cpp is not installed: pip install llama-cpp-python ({error})"
        raise RuntimeError(missing) from error
    context = LlamaContext(llama_cpp, file, threads, length)
    return context, llama_cpp.llama_print_system_info().decode()


def serve(
    context: LlamaContext, requests: TextIO, answer: Callable[[dict[str, Any]], None]
) -> None:
    """Answer requests, a line each, until there are no more."""
    for line in requests:
        request = json.loads(line)
        try:
            if "prefill" in request:
                answer({"seconds": context.prefill(request["prefill"])})
            else:
                answer({"seconds": context.rows(**request)})
        except RuntimeError as error:
            answer({"error": str(error)})


def main() -> None:
    # whatever the library prints goes to standard error: standard output is for answers
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(found: dict[str, Any]) -> None:
        print(json.dumps(found), file=answers, flush=True)

    file, threads, length = sys.argv[1:]
    try:
        context, info = load(file, int(threads), int(length))
    except RuntimeError as error:
        answer({"error": str(error)})
        return
    answer({"ready": info})
    serve(context, sys.stdin, answer)


if __name__ == "__main__":
    main()
