"""The next token from logits: greedy, or drawn from a distribution with transformers' options."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

# below it scaled logits leave the range of float32
COLDEST = 1e-5
# how many of the most probable tokens are sorted for top_p, before all are
NUCLEUS_SIZES = (256, 2048, 16384)
# tokens in a block of the cumulated sum that a draw searches
BLOCK = 256
# maps the tokens so far and the logits [1, V] after them to scores [1, V], perhaps in place
Process = Callable[[Sequence[int], Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn; the defaults decode greedily.

    Raises ``ValueError`` naming the field and its value.
    """

    # 0 is greedy
    temperature: float = 0.0
    # 0 keeps all
    top_k: int = 0
    top_p: float = 1.0
    # relative to the most probable token
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    # None draws differently every time
    seed: int | None = None
    # applied to each token's logits before anything else, once and in order; exact decoding only
    process: Process | None = None

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
            if not isinstance(getattr(self, name), int | float):
                self._refuse(name, "a number")
        if self.temperature != 0 and not COLDEST <= self.temperature < inf:
            self._refuse("temperature", f"0 (greedy), or finite and at least {COLDEST}")
        if not isinstance(self.top_k, int) or self.top_k < 0:
            self._refuse("top_k", "0 (off) or a positive integer")
        for name in ("top_p", "min_p"):
            if not 0 <= getattr(self, name) <= 1:
                self._refuse(name, "from 0 to 1")
        if not 0 < self.repetition_penalty < inf:
            self._refuse("repetition_penalty", "finite and above 0")
        if self.seed is not None and not (isinstance(self.seed, int) and 0 <= self.seed < 2**63):
            self._refuse("seed", "None or an integer from 0 to 2**63 - 1")

    def _refuse(self, name: str, wanted: str) -> None:
        raise ValueError(f"{name}={getattr(self, name)!r}: must be {wanted}")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def generator(self) -> torch.Generator:
        """The source of randomness for one sequence: on the CPU, so that a seed gives the same
        numbers on every device."""
        generator = torch.Generator("cpu")
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        return generator


GREEDY = Sampling()


def greedy(
    logits: Tensor, sampling: Sampling, context: Sequence[Sequence[int]] | None = None
) -> Tensor:
    """The most probable token of each row [R]; of equal ones the first."""
    return _penalised(logits, sampling, context).argmax(-1)


def probabilities(
    logits: Tensor, sampling: Sampling, context: Sequence[Sequence[int]] | None = None
) -> Tensor:
    """Distribution of the next token, float32 [R, V], after ``logits`` [R, V].

    The options apply in transformers' order: repetition penalty (``context`` holds the tokens of
    each row), temperature, top-k (all that equal the last one stay), top-p, min-p.
    """
    if sampling.greedy:
        best = greedy(logits, sampling, context)
        return torch.zeros_like(logits, dtype=torch.float32).scatter_(-1, best[:, None], 1.0)
    scores = _penalised(logits, sampling, context)
    if sampling.temperature != 1:
        scores = scores / sampling.temperature
    p, ids = _most_probable(scores, sampling)
    if ids is None and not sampling.min_p:
        return p
    if sampling.top_p < 1 and ids is not None:
        before = p.cumsum(-1, dtype=torch.float64) - p
        outside = before >= sampling.top_p
        outside[:, 0] = False
        p = p.masked_fill(outside, 0)
    if sampling.min_p:
        p = p.masked_fill(p < sampling.min_p * p.amax(-1, keepdim=True), 0)
    p = p / p.sum(-1, keepdim=True)
    return p if ids is None else torch.zeros_like(scores).scatter_(-1, ids, p)


def draw(p: Tensor, generator: torch.Generator) -> Tensor:
    """One token [R] from each row of ``p`` [R, V], which need not sum to one."""
    return _invert(p, _uniform((p.shape[0],), p, generator))


def _penalised(
    logits: Tensor, sampling: Sampling, context: Sequence[Sequence[int]] | None
) -> Tensor:
    penalty, process = sampling.repetition_penalty, sampling.process
    if penalty == 1 and process is None:
        return logits
    if context is None or len(context) != len(logits):
        given = "none" if context is None else len(context)
        what = f"repetition_penalty={penalty}" if process is None else "process"
        raise ValueError(f"{what}: needs the tokens of {len(logits)} rows, {given} given")
    logits = logits.clone()
    if process is not None:
        rows = zip(context, logits.split(1), strict=True)
        logits = torch.cat([process(tokens, row) for tokens, row in rows])
    if penalty == 1:
        return logits
    for row, tokens in zip(logits, context, strict=True):
        ids = torch.tensor(tokens, dtype=torch.long, device=logits.device)
        ids = ids[ids < logits.shape[-1]]  # a tokenizer may know more tokens than the LM head
        score = row[ids]
        row[ids] = torch.where(score < 0, score * penalty, score / penalty)
    return logits


def _most_probable(scores: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor | None]:
    """Probabilities [R, K], falling, and tokens [R, K] that hold what top-k and top-p keep.

    All probabilities in the order of the vocabulary and None where neither applies.
    """
    vocabulary, k = scores.shape[-1], sampling.top_k
    if 0 < k < vocabulary:
        top, ids = scores.topk(k + 1)
        last = top[:, k - 1 : k]
        if (top[:, k:] == last).any():
            top, ids = scores.topk(int((scores >= last).sum(-1).max()))
        return top.masked_fill(top < last, -inf).softmax(-1), ids
    p = scores.softmax(-1)
    if sampling.top_p == 1:
        return p, None
    for size in (*NUCLEUS_SIZES, vocabulary):
        ids = scores.topk(min(size, vocabulary)).indices
        top = p.gather(-1, ids)
        if (top.sum(-1, dtype=torch.float64) >= sampling.top_p).all():
            break
    return top, ids


def _uniform(shape: tuple[int, ...], p: Tensor, generator: torch.Generator) -> Tensor:
    numbers = torch.rand(shape, dtype=torch.float64, device="cpu", generator=generator)
    return numbers.to(p.device)


def _invert(p: Tensor, chance: Tensor) -> Tensor:
    """Tokens [R] at which the cumulated ``p`` [R, V] passes ``chance`` [R] of its total.

    Float64 sums over blocks first and then inside one block: never a token of zero probability.
    """
    rows, vocabulary = p.shape
    size = BLOCK if vocabulary > 2 * BLOCK else vocabulary
    blocks = torch.nn.functional.pad(p, (0, -vocabulary % size)).view(rows, -1, size)
    ends = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
    target = chance[:, None] * ends[:, -1:]
    block = _passed(ends, target)
    target = target - torch.nn.functional.pad(ends, (1, 0)).gather(1, block)
    inside = blocks[torch.arange(rows, device=p.device), block[:, 0]]
    token = _passed(inside.cumsum(-1, dtype=torch.float64), target)
    return (block * size + token)[:, 0]


def _passed(ends: Tensor, target: Tensor) -> Tensor:
    # a target rounded up to the total would fall off the end
    below = torch.nextafter(ends[:, -1:], torch.zeros_like(target))
    return torch.searchsorted(ends, target.minimum(below), right=True)
