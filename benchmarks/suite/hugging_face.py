"""The Hugging Face model as others decode with it: eager, or one compiled step over a static cache.

No token is read by the host before the answer is whole, which is more than transformers' own loop
does for it.
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
        said = torch.zeros(count, dtype=torch.long, device=device)
        positions = torch.arange(length, device=device)[None]
        given = torch.tensor([list(ids)], device=device)
        logits = self.step(given, positions, {self.name: self.mask[:, :, :length]})
        token = logits[:, -1:].argmax(-1)
        said[:1] = token[0]
        place = torch.tensor([[length]], device=device)

        def decode() -> None:
            for index in range(1, count):
                # what a CUDA graph gave is overwritten by the next
                torch.compiler.cudagraph_mark_step_begin()
                token.copy_(self.decode(token, place))
                said[index : index + 1] = token[0]
                place.add_(1)

        _, seconds = self.bench.timed(decode)
        return said.tolist(), seconds


def eager(bench: Bench) -> HfGreedy:
    return HfGreedy(bench, None)


def compiled(bench: Bench) -> HfGreedy:
    """``torch.compile(mode="reduce-overhead")``; tiny: traced alone, since nobody times it."""
    torch._dynamo.reset()
    if bench.options.tiny:
        return HfGreedy(bench, lambda step: torch.compile(step, backend="eager", fullgraph=True))
    return HfGreedy(
        bench,
        lambda step: torch.compile(step, mode="reduce-overhead", fullgraph=True, dynamic=False),
    )


def cudagraph_skips() -> int:
    """How often inductor left CUDA graphs out; a baseline without them is none."""
    from torch._dynamo.utils import counters

    return int(counters["inductor"]["cudagraph_skips"])
