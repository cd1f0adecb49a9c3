"""The trained draft head: one decoder layer over what was said and what the model thought.

    x  = fc([embedding of token t ; z of token t - 1])            z: the normed state that led to t
    x += attention(norm(x));  x += mlp(norm(x));  logits = hot rows of the LM head · norm(x)

After EAGLE (Li et al., ICML 2024), with norms, and candidates from the hot vocabulary alone. It
attends to the answer only: z already carries the prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from eepass.plan import causal_mask

HEAD_WIDTH = 64
NAMES = ("fc", "q", "k", "v", "o", "gate", "up", "down", "norm1", "norm2", "norm3")
SLOTS = 2048


def shapes(hidden: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the head's tensors for a model of width ``hidden``."""
    width = max(hidden // HEAD_WIDTH, 1) * HEAD_WIDTH
    inner = -(-hidden * 8 // 3 // 64) * 64
    return {
        "fc": (hidden, 2 * hidden),
        "q": (width, hidden),
        "k": (width, hidden),
        "v": (width, hidden),
        "o": (hidden, width),
        "gate": (inner, hidden),
        "up": (inner, hidden),
        "down": (hidden, inner),
        "norm1": (hidden,),
        "norm2": (hidden,),
        "norm3": (hidden,),
    }


def rotary(positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine [R, 64] of rotary positions [R]."""
    frequency = 10000.0 ** (-torch.arange(0, HEAD_WIDTH, 2).float() / HEAD_WIDTH)
    angle = torch.cat([positions.float()[:, None] * frequency] * 2, -1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def eagle_layer(
    embedded: Tensor,
    z: Tensor,
    cos: Tensor,
    sin: Tensor,
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    weights: Mapping[str, Tensor],
) -> Tensor:
    """embedded, z [B, T, H] -> normed state [B, T, H].

    ``attend`` takes q, k, v [B, heads, T, 64], rotary positions applied, and returns q's shape.
    """
    x = F.linear(torch.cat([embedded, z], -1), weights["fc"])
    normed = _norm(x, weights["norm1"])
    batch, length, _ = x.shape
    q, k, v = (
        F.linear(normed, weights[name]).view(batch, length, -1, HEAD_WIDTH).transpose(1, 2)
        for name in "qkv"
    )
    mixed = attend(_rotate(q, cos, sin), _rotate(k, cos, sin), v)
    x = x + F.linear(mixed.transpose(1, 2).reshape(batch, length, -1), weights["o"])
    normed = _norm(x, weights["norm2"])
    inner = F.silu(F.linear(normed, weights["gate"])) * F.linear(normed, weights["up"])
    x = x + F.linear(inner, weights["down"])
    return _norm(x, weights["norm3"])


class EagleDraft:
    """The draft head at work on one sequence; its own cache holds the last ``SLOTS`` tokens."""

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        embedding: Tensor,
        draft_tokens: int,
        compile: Callable[..., Callable[[list[Tensor]], Sequence[Tensor]]],
    ) -> None:
        dtype = embedding.dtype
        self.embedding = embedding
        self.draft_tokens = draft_tokens
        self.hot_ids = tensors["hot.ids"]
        self.weights = [tensors[f"eagle.{name}"].to(dtype) for name in NAMES]
        hidden = embedding.shape[1]
        heads = self.weights[NAMES.index("q")].shape[0] // HEAD_WIDTH
        shape = (1, heads, SLOTS, HEAD_WIDTH)
        self.keys, self.values = torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)
        # a ring: its oldest token makes room, and what is masked is what was never written
        self.masks = causal_mask(SLOTS, SLOTS, None, dtype)[0, 0]
        self.length = 0
        row = torch.zeros(1, 1, hidden, dtype=dtype)
        cos, sin = rotary(torch.zeros(1), dtype)
        # two tensors: a trace takes one tensor given twice for one input
        examples = [row, row.clone(), cos, sin, torch.zeros(1, dtype=torch.long), self.masks[:1]]
        examples += [self.keys, self.values, tensors["hot.head"], *self.weights]
        graph = _trace(examples)
        self._fixed = examples[6:]
        self._step = compile(graph, f"eagle.{hidden}.{dtype}", examples, logits=False)
        self._rotary = rotary(torch.arange(SLOTS), dtype)

    def propose(self, token: int, z: Tensor, position: int) -> Tensor:
        place = self.length % SLOTS
        mask = self.masks[min(self.length, SLOTS - 1)][None]
        cos, sin = (table[place : place + 1] for table in self._rotary)
        embedded = self.embedding[token][None, None]
        slot = torch.tensor([place])
        (logits,) = self._step([embedded, z, cos, sin, slot, mask, *self._fixed])
        self.length += 1
        return self.hot_ids[logits.topk(self.draft_tokens, -1).indices]

    def reset(self) -> None:
        self.length = 0


def _trace(examples: Sequence[Tensor]) -> GraphModule:
    def step(
        embedded: Tensor, z: Tensor, cos: Tensor, sin: Tensor, slot: Tensor, mask: Tensor,
        keys: Tensor, values: Tensor, hot_head: Tensor, *weights: Tensor,
    ) -> Tensor:  # fmt: skip
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            written = keys.index_copy_(2, slot, k), values.index_copy_(2, slot, v)
            return F.scaled_dot_product_attention(q, *written, mask[None, None])

        by_name = dict(zip(NAMES, weights, strict=True))
        state = eagle_layer(embedded, z, cos, sin, attend, by_name)
        return torch.ops.eepass.logits_rows(state[0], hot_head, None)

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes = [mode.from_tensor(x) for x in examples]
    with torch.no_grad():
        return make_fx(step, pre_dispatch=True)(*fakes)


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, 1e-5)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = HEAD_WIDTH // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin
