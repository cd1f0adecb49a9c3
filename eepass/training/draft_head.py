"""Train the draft head on the model's own answers."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from eepass.runtime.eagle import eagle_layer, rotary, shapes

PASSES = 3
BATCH = 24
RATE = 1e-3
# share of the states replaced by a noisy copy: at run time z comes from an exit as often as not
NOISE = 0.2


def fit_draft_head(
    token: Tensor,
    z: Tensor,
    place: Tensor,
    embedding: Tensor,
    hot_head: Tensor,
    progress: Callable[[int], None],
    passes: int = PASSES,
) -> dict[str, Tensor]:
    """The draft head's tensors, from answers laid end to end (``place`` 0 starts one).

    token [n], z [n, H], place [n]; embedding [V, H]; hot_head [N, H]. At each position the head
    sees the token there and the z before it, and learns the hot probabilities of the z there.
    """
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in shapes(z.shape[1]).items():
        value = torch.ones(shape)
        if len(shape) > 1:
            value = torch.randn(shape, generator=generator) * shape[1] ** -0.5
            value = value * (0.2 if name in ("o", "down") else 1.0)
        weights[name] = value.requires_grad_()
    optimizer = torch.optim.AdamW(weights.values(), RATE, betas=(0.9, 0.95), weight_decay=0.05)
    starts = (place == 0).nonzero()[:, 0].tolist()
    answers = [
        (begin, end)
        for begin, end in zip(starts, [*starts[1:], len(place)], strict=True)
        if end - begin > 2
    ]
    steps = max(passes * len(answers) // BATCH, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, step / 50) * max(0.02, 1 - step / steps)
    )
    dtype = z.dtype
    for _ in range(passes):
        for batch in torch.randperm(len(answers), generator=generator).split(BATCH):
            chosen = [answers[i] for i in batch.tolist()]
            tokens, before, targets, real = _padded(chosen, token, z, generator)
            with torch.no_grad():
                wanted = (targets[real] @ hot_head.T).float().softmax(-1)
            with torch.enable_grad():
                cast = {name: weight.to(dtype) for name, weight in weights.items()}
                cos, sin = rotary(torch.arange(tokens.shape[1]), dtype)
                state = eagle_layer(embedding[tokens], before, cos, sin, _causal, cast)
                logits = (state[real] @ hot_head.T).float()
                loss = F.cross_entropy(logits, wanted)
                optimizer.zero_grad()
                loss.backward()
            torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
            optimizer.step()
            schedule.step()
            progress(int(real.sum()))
    return {name: weight.detach().to(dtype) for name, weight in weights.items()}


@torch.no_grad()
def draft_states(
    weights: dict[str, Tensor], token: Tensor, z: Tensor, place: Tensor, embedding: Tensor
) -> Tensor:
    """The draft head's normed states [n, H] along answers laid end to end."""
    starts = (place == 0).nonzero()[:, 0].tolist()
    states = torch.zeros_like(z)
    for begin, end in zip(starts, [*starts[1:], len(place)], strict=True):
        tokens, before, _, _ = _padded([(begin, end)], token, z, None)
        cos, sin = rotary(torch.arange(end - begin), z.dtype)
        states[begin:end] = eagle_layer(embedding[tokens], before, cos, sin, _causal, weights)[0]
    return states


def _padded(
    answers: list[tuple[int, int]], token: Tensor, z: Tensor, generator: torch.Generator | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    length = max(end - begin for begin, end in answers)
    tokens = torch.zeros(len(answers), length, dtype=torch.long)
    before = torch.zeros(len(answers), length, z.shape[1], dtype=z.dtype)
    targets = torch.zeros_like(before)
    real = torch.zeros(len(answers), length, dtype=torch.bool)
    for row, (begin, end) in enumerate(answers):
        size = end - begin
        tokens[row, :size] = token[begin:end]
        before[row, 1:size] = z[begin : end - 1]
        targets[row, :size] = z[begin:end]
        # the first position's z belongs to the prompt's last token, which is not kept
        real[row, 1:size] = True
    if generator is not None:
        noise = torch.randn(before.shape, generator=generator) * z.float().std() * 0.5
        noisy = torch.rand(before.shape[:2], generator=generator) < NOISE
        before = (before.float() + noise * noisy[..., None]).to(z.dtype)
    return tokens, before, targets, real


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)
