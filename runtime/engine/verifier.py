"""Decide the next tokens after a forward pass, and how far the draft tokens are accepted.

    accepted   draft tokens that equal the next token of the node before them
    recovered  the next token where it equals no draft token: what stands there instead
    bonus      the next token after the last accepted draft token, where no draft followed

A pass gives the accepted tokens along one path of the tree, then one recovered or bonus token. With
guarantee ``exact`` a token that exited early is itself like a draft token until it has gone through
the last layer: its next token is then computed again, and where it differs, the recovered token
takes the place of all that followed.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from math import isfinite

import torch
from torch import Tensor

from eepass.errors import EngineError
from eepass.runtime.engine.forward_pass import PENDING, ForwardPass, RowLogits
from eepass.runtime.engine.scheduled_sequence import ScheduledSequence
from eepass.runtime.engine.sequence import Sequence
from eepass.runtime.exits.exits import Choose
from eepass.runtime.sampling import draw, greedy, probabilities
from eepass.runtime.statistics import Statistics


class Verifier:
    """Greedy next tokens are the argmax. Sampled ones are drawn from the dense distribution and
    then looked up among the draft tokens: as a draft proposes single tokens with certainty, that is
    speculative rejection sampling (arXiv 2211.17192).

    ``noise``: how far logits may differ between row counts; where the two best are closer, an exact
    answer may differ from the dense one.
    """

    def __init__(self, num_layers: int, exact: bool, noise: float = 0.0) -> None:
        self.num_layers, self.exact, self.noise = num_layers, exact, noise

    def exit_sampler(self, sequence: Sequence) -> Choose | None:
        """How an exit chooses its token: the argmax (None), or sampled where exits are final."""
        if self.exact or sequence.sampling.greedy:
            return None
        sampling, generator = sequence.sampling, sequence.generator
        assert generator is not None

        def choose(logits: Tensor) -> Tensor:
            return draw(probabilities(logits, sampling, [sequence.tokens]), generator)

        return choose

    def verify(
        self,
        forward_pass: ForwardPass,
        batch: SequenceOf[ScheduledSequence],
        statistics: Statistics,
    ) -> None:
        """Fill in each sequence's path and new tokens, and what is rolled back."""
        logits, used = forward_pass.lm_head(every_row=self.exact), list[Tensor]()
        for one in batch:
            if one.exit_layer == self.num_layers and not one.path:
                # a draft is not an answer yet
                counted = used if one.slots is None else []
                agreed = not self.exact or self._verify_pending(one, logits, used)
                if agreed and one.tree is not None:
                    self._accept_drafts(one, logits, counted)
            one.collect_new_tokens()
        self._count_near_ties(used, statistics)

    def _verify_pending(
        self, scheduled: ScheduledSequence, logits: RowLogits, used: list[Tensor]
    ) -> bool:
        """Whether the last layer agrees with the exits of all tokens that have caught up."""
        sequence = scheduled.sequence
        for position in sorted(scheduled.caught_up):
            used.append(logits[scheduled, PENDING, position])
            token = self.next_token(used[-1], sequence, sequence.tokens[: position + 1])
            if token != sequence.tokens[position + 1]:
                scheduled.reject_after(position, token)
                return False
        return True

    def _accept_drafts(
        self, scheduled: ScheduledSequence, logits: RowLogits, used: list[Tensor]
    ) -> None:
        """Walk down the tree while a draft token equals the next token of the node before it."""
        sequence = scheduled.sequence
        context = list(sequence.tokens)
        node: int | None = 0
        while node is not None:
            scheduled.path.append(node)
            if self.exact or node not in scheduled.next_tokens:
                used.append(logits[scheduled, node, len(context) - 1])
                scheduled.next_tokens[node] = self.next_token(used[-1], sequence, context)
            context.append(scheduled.next_tokens[node])
            node = self._accepted_child(scheduled, node, len(context) - 1, logits)

    def _accepted_child(
        self, scheduled: ScheduledSequence, node: int, position: int, logits: RowLogits
    ) -> int | None:
        """The child of ``node`` that is its next token, unless an exit that was wrong has dropped
        its row."""
        assert scheduled.tree is not None
        for child in scheduled.tree.children(node):
            if scheduled.tree.tokens[child] == scheduled.next_tokens[node]:
                decided = child in scheduled.next_tokens and not self.exact
                return child if decided or (scheduled, child, position) in logits else None
        return None

    def next_token(self, logits: Tensor, sequence: Sequence, context: SequenceOf[int]) -> int:
        """The token that follows ``context`` by its logits [1, V]."""
        sampling = sequence.sampling
        if sampling.greedy:
            token = int(greedy(logits, sampling, [context])[0])
        else:
            assert sequence.generator is not None
            token = int(draw(probabilities(logits, sampling, [context]), sequence.generator)[0])
        if not isfinite(logits[0, token].item()):
            raise EngineError(
                "the logits are not finite: the weights hold NaN or inf, or the dtype is too narrow"
            )
        return token

    def _count_near_ties(self, used: list[Tensor], statistics: Statistics) -> None:
        if self.exact and used and self.noise:
            best = torch.cat(used).topk(2).values
            statistics.near_ties += int((best[:, 0] - best[:, 1] <= self.noise).sum())
