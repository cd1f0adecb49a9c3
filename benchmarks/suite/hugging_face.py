"""The Hugging Face model as others decode with it: eager, or one compiled step over a static cache.

The host reads no token before the last one is decoded, which is faster than transformers' own loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.suite.bench import Bench
from eepass.masks import causal_mask
from eepass.passes.trace.decode_step import decode_step


class HfGreedy:
    """Greedy decoding over a static cache; ``compile`` takes the one-token step."""

    def __init__(
        self, bench: Bench, compile: Callable[[Callable[..., Any]], Callable[..., Any]] | None
    ) -> None:
        self.bench, model = bench, bench.twin
        length = bench.max_length
        self.step = decode_step(model, length)
        (window,) = self.step.windows.values()
        self.name = next(iter(self.step.windows))
        self.mask = causal_mask(length, length, window, bench.dtype, bench.device)
        self.decode: Callable[..., Any] = self._one_token
        if compile is not None:
            self.decode = compile(self._one_token)

    def _one_token(self, ids: Tensor, positions: Tensor) -> Tensor:
        mask = self.mask.index_select(2, positions[0])
        return self.step(ids, positions, {self.name: mask})[:, -1:].argmax(-1)

    @torch.no_grad()
    def answer(self, ids: Sequence[int], count: int) -> tuple[list[int], float]:
        """The answer, and the seconds all its tokens but the first took."""
        for slots in self.step.slots:
            if slots.start is not None:
                slots.start.zero_()
        device, length = self.bench.device, len(ids)
        answer = torch.zeros(count, dtype=torch.long, device=device)
        positions = torch.arange(length, device=device)[None]
        prompt = torch.tensor([list(ids)], device=device)
        logits = self.step(prompt, positions, {self.name: self.mask[:, :, :length]})
        token = logits[:, -1:].argmax(-1)
        answer[:1] = token[0]
        place = torch.tensor([[length]], device=device)

        def decode() -> None:
            for index in range(1, count):
                # the next replay of a CUDA graph overwrites this one's outputs
                torch.compiler.cudagraph_mark_step_begin()
                token.copy_(self.decode(token, place))
                answer[index : index + 1] = token[0]
                place.add_(1)

        _, seconds = self.bench.timed(decode)
        return answer.tolist(), seconds


def eager(bench: Bench) -> HfGreedy:
    return HfGreedy(bench, None)


def compiled(bench: Bench) -> HfGreedy:
    """``torch.compile(mode="reduce-overhead")``; tiny: traced only, since it is not timed."""
    torch._dynamo.reset()
    if bench.options.tiny:
        return HfGreedy(bench, lambda step: torch.compile(step, backend="eager", fullgraph=True))
    return HfGreedy(
        bench,
        lambda step: torch.compile(step, mode="reduce-overhead", fullgraph=True, dynamic=False),
    )


def cudagraph_skips() -> int:
    """How often inductor skipped CUDA graphs; a baseline without them is not a fair one."""
    from torch._dynamo.utils import counters

    return int(counters["inductor"]["cudagraph_skips"])
