"""What early exit is measured against: the Hugging Face model, eager or compiled, and llama.cpp."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch._inductor.config

from eepass.errors import InputError
from eepass.masks import causal_mask
from eepass.passes.trace.decode_step import decode_step

# whole-model compilation in its variants; the fastest on this machine is the baseline
VARIANTS: dict[str, dict[str, Any]] = {
    "static cache": {},
    "static cache, freezing": {"freezing": True},
}


class HfDecoder:
    """Greedy decoding with a Hugging Face model over a static cache.

    ``options`` for inductor compile its one-token step; None leaves it eager.
    """

    def __init__(
        self, model: Any, cache_length: int, options: dict[str, Any] | None = None
    ) -> None:
        self.step = decode_step(model, cache_length)
        self.cache_length = cache_length
        self.dtype = next(model.parameters()).dtype
        self.masks = {
            name: causal_mask(cache_length, cache_length, window, self.dtype)
            for name, window in self.step.windows.items()
        }
        self.decode: Callable[..., torch.Tensor] = self.step
        if options is not None:
            # a function of its own, so that one variant's compiled code is not another's
            def one_token(
                ids: torch.Tensor, positions: torch.Tensor, masks: dict[str, torch.Tensor]
            ) -> torch.Tensor:
                return self.step(ids, positions, masks)

            self.decode = torch.compile(
                one_token, dynamic=False, fullgraph=True, options=options or None
            )

    def timed(
        self, new_tokens: int, stop: frozenset[int]
    ) -> Callable[[list[int]], tuple[list[int], float]]:
        """A function from a prompt to its answer and the seconds all tokens but the first took."""

        def run(ids: list[int]) -> tuple[list[int], float]:
            for slots in self.step.slots:
                if slots.start is not None:
                    slots.start.zero_()
            with torch.no_grad():
                rows = len(ids)
                logits = self.step(
                    torch.tensor([ids]), torch.arange(rows)[None], self._masks(0, rows)
                )
                answer = [int(logits[0, -1].argmax())]
                began = perf_counter()
                while len(answer) < new_tokens and answer[-1] not in stop:
                    position = rows + len(answer) - 1
                    logits = self.decode(
                        torch.tensor([[answer[-1]]]),
                        torch.tensor([[position]]),
                        self._masks(position, 1),
                    )
                    answer.append(int(logits[0, -1].argmax()))
            return answer, perf_counter() - began

        return run

    def _masks(self, start: int, rows: int) -> dict[str, torch.Tensor]:
        return {name: mask[:, :, start : start + rows] for name, mask in self.masks.items()}


def fastest_compiled(model: Any, cache_length: int, prompt: list[int]) -> tuple[str, HfDecoder]:
    """Compile every variant, decode with each, and keep the fastest; its name says which it is."""
    best: tuple[float, str, HfDecoder] | None = None
    for name, options in VARIANTS.items():
        torch._dynamo.reset()
        decoder = HfDecoder(model, cache_length, options)
        with torch._inductor.config.patch(options):
            run = decoder.timed(24, frozenset())
            run(prompt)
            seconds = min(run(prompt)[1] for _ in range(3))
        if best is None or seconds < best[0]:
            best = (seconds, name, decoder)
    assert best is not None
    return best[1], best[2]


class LlamaCpp:
    """Greedy decoding of a GGUF file with llama.cpp, in the file's own quantisation."""

    def __init__(self, gguf_path: Path, threads: int, context: int) -> None:
        try:
            llama_cpp = importlib.import_module("llama_cpp")
        except ImportError as error:
            raise InputError(
                "llama.cpp is not installed: pip install llama-cpp-python"
                " (built from source; needs cmake and a C++ compiler)"
            ) from error
        try:
            self.llama = llama_cpp.Llama(
                model_path=str(gguf_path),
                n_ctx=context,
                n_threads=threads,
                n_threads_batch=threads,
                verbose=False,
            )
        except ValueError as error:
            raise InputError(f"{gguf_path}: llama.cpp cannot load it ({error})") from error

    def timed(
        self, new_tokens: int, stop: frozenset[int]
    ) -> Callable[[list[int]], tuple[list[int], float]]:
        """As ``HfDecoder.timed``; the prompt's tokens are the caller's, not llama.cpp's."""

        def run(ids: list[int]) -> tuple[list[int], float]:
            self.llama.reset()
            self.llama.eval(ids)
            answer = [self._best()]
            began = perf_counter()
            while len(answer) < new_tokens and answer[-1] not in stop:
                self.llama.eval(answer[-1:])
                answer.append(self._best())
            return answer, perf_counter() - began

        return run

    def _best(self) -> int:
        # the defaults draw at random
        return int(self.llama.sample(temp=0.0, repeat_penalty=1.0))
