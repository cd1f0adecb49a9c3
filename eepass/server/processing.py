"""What a request adds to the sampling of its tokens: biases, penalties, log-probabilities."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Scored:
    """A token, its log-probability, and the most probable tokens at its place with theirs."""

    token: int
    logprob: float
    top: list[tuple[int, float]]


class Processing:
    """``Sampling.process`` of one request, called once for each of its tokens in order.

    The penalties are OpenAI's: for a token that the answer has c times already, its logit loses
    ``frequency`` times c, and ``presence`` once. With ``top`` each token's log-probability is kept
    until it is taken, beside the ``top`` greatest; it is the model's own, before biases and
    penalties.
    """

    def __init__(
        self, prompt_length: int, frequency: float = 0.0, presence: float = 0.0,
        bias: Mapping[int, float] | None = None, top: int | None = None,
    ) -> None:  # fmt: skip
        self.prompt_length, self.top = prompt_length, top
        self.frequency, self.presence = frequency, presence
        self._biased = torch.tensor(list(bias or {}), dtype=torch.long)
        self._bias = torch.tensor(list((bias or {}).values()), dtype=torch.float32)
        self._kept: deque[Tensor] = deque()

    @property
    def changes_nothing(self) -> bool:
        return not (self.frequency or self.presence or len(self._biased) or self.top is not None)

    def __call__(self, context: Sequence[int], logits: Tensor) -> Tensor:
        """Scores [1, V] of ``logits`` [1, V], which follow ``context``."""
        if self.top is not None:
            self._kept.append(logits[0].float().log_softmax(-1))
        scores = logits.float()
        if len(self._biased):
            scores = scores.index_add(1, self._biased, self._bias[None])
        answer = context[self.prompt_length :]
        if answer and (self.frequency or self.presence):
            said, counts = torch.tensor(answer).unique(return_counts=True)
            scores = scores.index_add(1, said, -(counts * self.frequency + self.presence)[None])
        return scores

    def take(self, token: int) -> Scored | None:
        """The log-probability of ``token``, the next one decided; None where none is kept."""
        if self.top is None:
            return None
        kept = self._kept.popleft()
        best = kept.topk(min(self.top, len(kept)))
        top = list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        return Scored(token, float(kept[token]), top)
