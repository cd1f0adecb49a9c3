"""What of a pass holds: guesses against the last layer's word, drafts against the answers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from eepass.errors import EngineError
from eepass.runtime.decoder.decoder import Decoder
from eepass.runtime.engine.forward_pass import ForwardPass, Part
from eepass.runtime.engine.sequence import Sequence as Decoding
from eepass.runtime.exits.exits import Choose
from eepass.runtime.sampling import draw, greedy, probabilities
from eepass.runtime.statistics import Statistics


class Verifier:
    """Finds the answer of each row and walks along the answers as far as the drafts go.

    Greedy answers are the argmax. Sampled ones are drawn from the dense distribution and then
    looked for among the drafts: drafts are proposals of one token each, for which that is
    speculative rejection sampling. ``noise``: how far logits may differ between row
    counts; where the two best are nearer, an exact answer may differ from the dense one.
    """

    def __init__(self, decoder: Decoder, exact: bool, noise: float = 0.0) -> None:
        self.decoder, self.exact, self.noise = decoder, exact, noise

    def chooser(self, sequence: Decoding) -> Choose | None:
        """How an exit names its token: the argmax (None), or drawn where exits are final."""
        if self.exact or sequence.sampling.greedy:
            return None
        sampling, generator = sequence.sampling, sequence.generator
        assert generator is not None

        def choose(logits: Tensor) -> Tensor:
            context = [sequence.tokens] * len(logits)
            return draw(probabilities(logits, sampling, context), generator)

        return choose

    def first_token(self, hidden: Tensor, sequence: Decoding) -> int:
        """What follows a prompt whose last boundary is hidden [1, 1, H]."""
        return self._answer(self.decoder.logits(hidden)[0], 0, sequence, sequence.tokens)

    def decide(
        self,
        verification: ForwardPass,
        parts: Sequence[Part],
        statistics: Statistics,
    ) -> None:
        """Fill in what each part of a pass leads to: path, tokens, what is taken back."""
        logits = self._logits(verification, statistics)
        visited: list[int] = []
        for part in parts:
            if part.layer == self.decoder.num_layers and not part.path:
                self._walk(part, logits, visited)
            part.settle()
        self._count_near_ties(logits, visited, statistics)

    def _walk(self, part: Part, logits: _Rows, visited: list[int]) -> None:
        sequence, tokens = part.sequence, part.sequence.tokens
        if self.exact:
            for position in sorted(part.caught_up):
                row = logits.of[part, -1, position]
                visited.append(row)
                answer = self._answer(logits.values, row, sequence, tokens[: position + 1])
                if answer != tokens[position + 1]:
                    part.roll_back(position, answer)
                    return
        if part.tree is None:
            return
        node: int | None = 0
        context = list(tokens)
        while node is not None:
            part.path.append(node)
            if self.exact or node not in part.answers:
                row = logits.of[part, node, len(context) - 1]
                visited.append(row)
                part.answers[node] = self._answer(logits.values, row, sequence, context)
            context.append(part.answers[node])
            node = self._next(part, node, len(context) - 1, logits)

    def _next(self, part: Part, node: int, position: int, logits: _Rows) -> int | None:
        """The child of ``node`` that its answer names, if it came through: an exit that was wrong
        may have dropped it."""
        assert part.tree is not None
        for child in part.tree.children(node):
            if part.tree.tokens[child] == part.answers[node]:
                known = child in part.answers and not self.exact
                return child if known or (part, child, position) in logits.of else None
        return None

    def _logits(self, verification: ForwardPass, statistics: Statistics) -> _Rows:
        """Logits of the rows at the last boundary whose answer is asked for."""
        hidden, whose = verification.ended
        wanted = [
            index
            for index, (part, node, _) in enumerate(whose)
            if self.exact or (node >= 0 and node not in part.answers)
        ]
        if hidden is None or not wanted:
            return _Rows(torch.zeros(0, 1), {})
        size = self.decoder.bucket(len(wanted))
        if len(wanted) < len(whose) or size < hidden.shape[1]:
            hidden = hidden[:, torch.tensor(wanted + wanted[-1:] * (size - len(wanted)))]
        values = self.decoder.logits(hidden)[0]
        statistics.full_heads += len(wanted)
        return _Rows(values, {whose[index]: row for row, index in enumerate(wanted)})

    def _answer(self, logits: Tensor, row: int, sequence: Decoding, context: Sequence[int]) -> int:
        one = logits[row : row + 1]
        sampling = sequence.sampling
        if sampling.greedy:
            token = int(greedy(one, sampling, [context])[0])
        else:
            assert sequence.generator is not None
            token = int(draw(probabilities(one, sampling, [context]), sequence.generator)[0])
        if not torch.isfinite(one[0, token]):
            raise EngineError(
                "the logits are not finite: the weights hold NaN or inf, or the dtype is too narrow"
            )
        return token

    def _count_near_ties(self, logits: _Rows, visited: list[int], statistics: Statistics) -> None:
        if not (self.exact and visited and self.noise):
            return
        seen = logits.values[visited]
        best = seen.max(-1)
        second = seen.scatter(-1, best.indices[:, None], -torch.inf).amax(-1)
        statistics.near_ties += int((best.values - second <= self.noise).sum())


class _Rows:
    """Logits [R, V], and which row belongs to which part, node and position."""

    def __init__(self, values: Tensor, of: dict[tuple[Part, int, int], int]) -> None:
        self.values, self.of = values, of
