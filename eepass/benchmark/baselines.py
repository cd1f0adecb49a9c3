"""What early exit is measured against: the Hugging Face model, eager or compiled, and llama.cpp."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from itertools import islice
from operator import itemgetter
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from eepass.errors import InputError
from eepass.masks import causal_mask
from eepass.passes.trace.decode_step import decode_step
from eepass.private_names import inductor_config

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

    def tokens(self, ids: list[int], new_tokens: int, stop: frozenset[int]) -> Iterator[int]:
        """The answer to ``ids``, token by token; the first comes from the prompt's pass."""
        for slots in self.step.slots:
            if slots.start is not None:
                slots.start.zero_()
        token = self._next(self.step, ids, 0)
        yield token
        for position in range(len(ids), len(ids) + new_tokens - 1):
            if token in stop:
                return
            token = self._next(self.decode, [token], position)
            yield token

    @torch.no_grad()
    def _next(self, step: Callable[..., torch.Tensor], ids: list[int], start: int) -> int:
        rows = len(ids)
        positions = torch.arange(start, start + rows)[None]
        masks = {name: mask[:, :, start : start + rows] for name, mask in self.masks.items()}
        return int(step(torch.tensor([ids]), positions, masks)[0, -1].argmax())


def fastest_compiled(model: Any, cache_length: int, prompt: list[int]) -> tuple[str, HfDecoder]:
    """Compile every variant, decode with each, and keep the fastest; its name says which it is."""
    measured = []
    for name, options in VARIANTS.items():
        torch.compiler.reset()
        decoder = HfDecoder(model, cache_length, options)
        with inductor_config.patch(options):
            _decode_seconds(decoder, prompt)
            seconds = min(_decode_seconds(decoder, prompt) for _ in range(3))
        measured.append((seconds, name, decoder))
    _, name, decoder = min(measured, key=itemgetter(0))
    return name, decoder


def _decode_seconds(decoder: HfDecoder, prompt: list[int]) -> float:
    tokens = decoder.tokens(prompt, 24, frozenset())
    next(tokens)
    began = perf_counter()
    list(tokens)
    return perf_counter() - began


# draft tokens of llama.cpp's look-up: as its package recommends for a machine without a GPU
LOOK_UP_TOKENS = 2


class LlamaCpp:
    """Greedy decoding of a GGUF file with llama.cpp, in the file's own quantisation.

    ``look_up``: with prompt look-up decoding, as its Python package has it. ``all_logits``: compute
    the logits of every token, as the look-up does, and not of the last one alone.
    """

    def __init__(
        self, gguf_path: Path, threads: int, context: int, look_up: bool = False,
        all_logits: bool = False,
    ) -> None:  # fmt: skip
        try:
            llama_cpp = importlib.import_module("llama_cpp")
            speculative = importlib.import_module("llama_cpp.llama_speculative")
        except ImportError as error:
            raise InputError(
                "llama.cpp is not installed: pip install llama-cpp-python"
                " (built from source; needs cmake and a C++ compiler)"
            ) from error
        draft = None
        if look_up:
            draft = speculative.LlamaPromptLookupDecoding(num_pred_tokens=LOOK_UP_TOKENS)
            # at the end of an answer its draft tokens reach beyond it
            context += LOOK_UP_TOKENS + 1
        try:
            self.llama = llama_cpp.Llama(
                model_path=str(gguf_path),
                n_ctx=context,
                n_threads=threads,
                n_threads_batch=threads,
                draft_model=draft,
                # the look-up keeps the logits of every token, and has room for a batch without
                logits_all=look_up or all_logits,
                verbose=False,
            )
        except ValueError as error:
            raise InputError(f"{gguf_path}: llama.cpp cannot load it ({error})") from error

    def tokens(self, ids: list[int], new_tokens: int, stop: frozenset[int]) -> Iterator[int]:
        """As ``HfDecoder.tokens``; the prompt is tokenised by the caller, not by llama.cpp."""
        # its defaults sample at random
        answer = self.llama.generate(ids, temp=0.0, repeat_penalty=1.0)
        for token in islice(answer, new_tokens):
            yield int(token)
            if token in stop:
                return
