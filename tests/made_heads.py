"""Random draft heads for a step, and heads that name what mostly follows a token."""

from __future__ import annotations

from collections import Counter, defaultdict
from functools import partial
from itertools import pairwise

import torch
from models import VOCABULARY, eager_compile

from eepass.runtime.drafting.eagle_head import EagleHead
from eepass.runtime.drafting.eagle_layer import HeadStyle
from eepass.runtime.drafting.features import Features
from eepass.runtime.step.head_drafts import HeadDrafts

FEATURE_LAYERS = (0, 2)
ROTARY = 10000.0 ** -(torch.arange(0, 16, 2) / 16)


def reader(features):
    """Reads ``features`` [n, F * H], those of the token before each of n tokens, all normed."""
    after = features[1:]
    return lambda position, count: Features(after[position : position + count], [True] * count)


def made_head(decoder, follows=(), seed=0):
    """A random head, or one that names what ``follows`` each token, from its feature z alone."""
    generator = torch.Generator().manual_seed(seed)
    hidden = decoder.hidden_size
    style = HeadStyle(hidden, 4, 2, ROTARY, 128, 1 + len(FEATURE_LAYERS))
    tensors = {
        f"eagle.{name}": torch.randn(shape, generator=generator) * shape[-1] ** -0.5
        if len(shape) > 1 else torch.rand(shape, generator=generator) + 0.5
        for name, shape in style.shapes().items()
    }  # fmt: skip
    tensors |= {"eagle.rotary": ROTARY, "eagle.features": torch.tensor(FEATURE_LAYERS)}
    tensors["eagle.hot.ids"] = torch.arange(0, VOCABULARY, 2)
    tensors["eagle.hot.head"] = torch.randn(VOCABULARY // 2, hidden, generator=generator) / 4
    if follows:
        for name in ("fc", "o", "down"):
            tensors[f"eagle.{name}"].zero_()
        tensors["eagle.fc"][:, :hidden] = torch.eye(hidden)
        for name in ("fc_norm", "hidden_norm", "norm"):
            tensors[f"eagle.{name}"].fill_(1)
        # z is most like the row of the LM head of the token it stands before
        rows = decoder.tensors[decoder.splits[1].head.weight]
        tensors["eagle.hot.ids"] = torch.tensor([t for _, *named in follows for t in named])
        scaled = [row for token, *_ in follows for row in (1.2 * rows[token], rows[token])]
        tensors["eagle.hot.head"] = torch.stack(scaled)
    embedding = torch.randn(VOCABULARY, hidden, generator=generator) / 4
    return EagleHead(tensors, embedding, eager_compile)


def bigrams(answers):
    """For each token what is named after it: first another token, then what mostly follows."""
    found = defaultdict(Counter)
    for answer in answers:
        for token, following in pairwise(answer):
            found[token][following] += 1
    named = {token: counts.most_common(1)[0][0] for token, counts in found.items()}
    return tuple((token, (right + 1) % VOCABULARY, right) for token, right in named.items())


def drafts_of(decoder, follows=()):
    norm = partial(decoder.splits[1].head.normed, tensors=decoder.tensors)
    return HeadDrafts(made_head(decoder, follows), norm, eager_compile)
