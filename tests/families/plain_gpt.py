"""A decoder in plain ``torch.nn``: own keys and values, modules named without meaning.

It shows, as does what ``torch.export`` makes of it, that layers are found by structure.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eepass.masks import causal_mask
from eepass.passes.pipeline import SPLIT, TRACED
from eepass.passes.report import PassReport
from eepass.passes.runner import PassRunner
from eepass.passes.split.check import computes_as
from eepass.passes.trace.capture import KvSlots, capture
from eepass.segments import SplitDecoder

HEADS, WIDTH, VOCABULARY = 4, 32, 96


class Block(nn.Module):
    g: Tensor
    h: Tensor
    i: Tensor

    def __init__(self, slots: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.c, self.d = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.e, self.f = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        for name in ("g", "h"):
            self.register_buffer(name, torch.zeros(1, HEADS, slots, WIDTH // HEADS))
        self.register_buffer("i", torch.tensor(0))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.split(x)
        at = torch.arange(x.shape[1]) + self.i
        self.i.add_(x.shape[1])
        keys, values = self.g.index_copy_(2, at, k), self.h.index_copy_(2, at, v)
        return self.join(x, F.scaled_dot_product_attention(q, keys, values, mask))

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        parts = self.a(self.e(x)).chunk(3, -1)
        return tuple(p.view(1, -1, HEADS, WIDTH // HEADS).transpose(1, 2) for p in parts)

    def join(self, x: Tensor, mixed: Tensor) -> Tensor:
        x = x + self.b(mixed.transpose(1, 2).flatten(2))
        joined: Tensor = x + self.d(F.gelu(self.c(self.f(x))))
        return joined


class PlainGpt(nn.Module):
    """``forward(ids [1, R], positions [1, R], masks) -> logits [1, R, V]`` over its own cache."""

    def __init__(self, depth: int, slots: int) -> None:
        super().__init__()
        self.p, self.q = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(slots, WIDTH)
        self.r = nn.ModuleList(Block(slots) for _ in range(depth))
        self.s, self.t = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, ids: Tensor, positions: Tensor, masks: Mapping[str, Tensor]) -> Tensor:
        x = self.p(ids) + self.q(positions)
        for block in self.r:
            x = block(x, masks["attention"])
        logits: Tensor = self.t(self.s(x))
        return logits

    def in_one_go(self, ids: Tensor, depth: int) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
        """Logits [1, n, V] after ``depth`` layers and their keys and values, without a cache."""
        x = self.p(ids) + self.q(torch.arange(ids.shape[1])[None])
        kept: list[tuple[Tensor, ...]] = []
        for block in list(self.r)[:depth]:
            assert isinstance(block, Block)
            q, k, v = block.split(x)
            kept.append((k, v))
            x = block.join(x, F.scaled_dot_product_attention(q, k, v, is_causal=True))
        logits: Tensor = self.t(self.s(x))
        return logits, kept


def split_plain(model: PlainGpt, rows: int, slots: int, exported: bool) -> SplitDecoder:
    """``model`` captured for ``rows`` rows and split; through ``torch.export`` if ``exported``."""
    ids, positions = torch.zeros(1, rows, dtype=torch.long), torch.arange(rows)[None]
    masks = {"attention": causal_mask(rows, slots, None, torch.float32)}
    step: nn.Module = model
    if exported:
        step = torch.export.export(model, (ids, positions, masks)).module()
    buffers = dict(step.named_buffers())
    cache = []
    for layer in range(len(model.r)):
        keys, values, start = (buffers[f"r.{layer}.{name}"] for name in "ghi")
        cache.append(KvSlots(keys, values, start))
    decoder = capture(
        step, ids, positions, masks, dict(step.named_parameters()), cache, {"attention": None}
    )
    runner = PassRunner(PassReport())
    decoder = runner.run(decoder, TRACED)
    split: SplitDecoder = runner.run(decoder, SPLIT, computes_as(decoder))
    return split
