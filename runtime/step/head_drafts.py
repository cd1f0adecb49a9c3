"""Draft tokens from the trained draft head within a step: its levels run on the device.

The head runs the tokens that the pass before has confirmed, with the hidden states that pass has
left as their features, and grows a tree after the last of them (EAGLE-2's dynamic trees: Li et al.,
2024). The host runs the prompt alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from eepass.runtime.drafting.eagle_form import WINDOW
from eepass.runtime.drafting.eagle_head import WIDTH, Compiled, EagleHead
from eepass.runtime.drafting.eagle_steps import trace_tree
from eepass.runtime.drafting.features import Norm
from eepass.runtime.step.tree_shape import TreeShape
from eepass.segments import GraphToMake

Compile = Callable[..., Compiled]


class HeadDrafts:
    """The draft ``head`` of the one sequence that a step decodes; ``norm``: the model's last;
    ``compile``: that of captured layers."""

    def __init__(self, head: EagleHead, norm: Norm, compile: Compile) -> None:
        self.head, self.norm, self._compile = head, norm, compile
        self.layers = head.feature_layers
        # of the token before the next, none before the first
        self._last = self._none = torch.zeros(1, head.feature_size, dtype=head.dtype)

    def state(self) -> dict[str, Tensor]:
        """What the head keeps from pass to pass."""
        state, _, _ = self.head.memory
        return dict(zip(("head positions", "head keys", "head values"), state, strict=True))

    def levels(self, shape: TreeShape, confirmed: int) -> Callable[..., Sequence[Tensor]]:
        """From up to ``confirmed`` confirmed tokens [M], their features [M, F * H], the position of
        the first [1], how many they are [1], and ``state``: the ids and the rows above of
        ``shape.named`` draft tokens, in rows from 1 on."""
        state, weights, layout = self.head.memory
        device = self.head.hot_ids.device
        number = torch.zeros(1, dtype=torch.long, device=device)
        ids = torch.zeros(confirmed, dtype=torch.long, device=device)
        features = self._none.new_zeros(confirmed, self.head.feature_size)
        examples = [ids, features, number, number.clone(), *state, *weights]
        make = partial(trace_tree, shape.levels, WIDTH, shape.named, layout, examples)
        shapes = [tuple(x.shape) for x in examples]
        structure = f"eagle.tree.{shape}.{shapes}.{self.head.dtype}.{layout.structure}"
        compiled = self._compile(GraphToMake(make), structure, examples)
        return lambda *given: compiled([*given, *weights])

    def begin(self) -> None:
        """Forget the sequence before."""
        self.head.truncate(0)
        self._last = self._none

    def follow(self, tokens: Sequence[int], features: Tensor, left: int) -> Tensor:
        """Run ``tokens`` of a prompt, whose own features are ``features`` [n, F * H], z not normed;
        ``left``: how many more of the prompt come. Returns the features of the last [1, F * H]."""
        size = features.shape[1] // (1 + len(self.layers))
        features = torch.cat([self.norm(features[None, :, :size])[0], features[:, size:]], -1)
        # no later row attends further back than a window
        skipped = min(max(len(tokens) + left - WINDOW, 0), len(tokens))
        before = torch.cat([self._last, features[:-1]])
        self.head.skip(skipped)
        self.head.extend(tokens[skipped:], before[skipped:])
        self._last = features[-1:]
        return self._last
