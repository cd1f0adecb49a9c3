"""transformers' logits processors, as the engine's own sampling where that is equivalent."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from math import inf
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

from eepass.errors import InputError
from eepass.runtime.sampling import Sampling

# in the order in which Sampling applies them, with the field each of them is
NATIVE: dict[type, str] = {
    RepetitionPenaltyLogitsProcessor: "penalty",
    TemperatureLogitsWarper: "temperature",
    TopKLogitsWarper: "top_k",
    TopPLogitsWarper: "top_p",
    MinPLogitsWarper: "min_p",
}


def native_options(processors: Sequence[Any], padding: Tensor) -> dict[str, float] | None:
    """The fields of ``Sampling`` that are equivalent to ``processors``, or None if there are none.

    ``padding``: the number of padding tokens [B] at each row's left.
    """
    order = list(NATIVE)
    places = [order.index(type(p)) if type(p) in NATIVE else -1 for p in processors]
    if -1 in places or places != sorted(set(places)):
        return None
    options = {}
    for processor in processors:
        ignored = getattr(processor, "prompt_ignore_length", None)
        usual = (
            getattr(processor, "filter_value", -inf) == -inf
            and getattr(processor, "min_tokens_to_keep", 1) == 1
            and getattr(processor, "logits_indices", None) is None
            and (ignored is None or (torch.is_tensor(ignored) and torch.equal(ignored, padding)))
        )
        if not usual:
            return None
        name = NATIVE[type(processor)]
        options["repetition_penalty" if name == "penalty" else name] = getattr(processor, name)
    return options


class RowProcessors:
    """Calls ``processors`` for one row of a batch, the way ``generate`` does.

    They get token ids [B, T] with the row's padding, and logits [B, V]: this row's, B times, so
    that a processor which reads the row's number finds its own. Where there are several rows each
    gets a copy of the processors, whose state is that of one text. With ``keep``, ``logits`` and
    ``scores`` hold the model's logits and the processed ones of each token, in order.
    """

    def __init__(
        self, processors: LogitsProcessorList, row: int, padding: Sequence[int], rows: int,
        keep: bool = False,
    ) -> None:  # fmt: skip
        self.row, self.rows, self.padding, self.keep = row, rows, list(padding), keep
        self.logits: list[Tensor] = []
        self.scores: list[Tensor] = []
        self.processors: Any = processors
        if rows > 1:
            try:
                self.processors = copy.deepcopy(processors)
            except Exception as error:
                names = ", ".join(type(p).__name__ for p in processors)
                raise InputError(
                    f"logits_processor: a batch of {rows} needs {rows} copies of {names}, and they "
                    f"cannot be copied ({error}); generate one prompt at a time"
                ) from error

    def __call__(self, tokens: Sequence[int], logits: Tensor) -> Tensor:
        """Scores [1, V] of ``logits`` [1, V], which follow ``tokens``."""
        if self.keep:
            self.logits.append(logits.clone())
        ids = torch.tensor([[*self.padding, *tokens]]).repeat(self.rows, 1)
        scores = self.processors(ids, logits.repeat(self.rows, 1))[self.row : self.row + 1]
        if not (scores > -inf).any():
            raise InputError(
                "logits_processor: no token is left to choose from; allow at least one"
            )
        if self.keep:
            self.scores.append(scores.clone())
        return scores


def kept_by_token(
    processors: Sequence[RowProcessors], name: str, lengths: Sequence[int]
) -> tuple[Tensor, ...]:
    """For each new token the ``name`` ("logits", "scores") [B, V] that the rows' processors kept;
    zeros for rows that had ended."""
    rows: list[list[Tensor]] = [getattr(each, name) for each in processors]
    nothing = torch.zeros_like(rows[0][0])
    return tuple(
        torch.cat([r[at] if at < n else nothing for r, n in zip(rows, lengths, strict=True)])
        for at in range(max(lengths))
    )


def refuse_processors(processors: Sequence[Any], native: bool, approximate: bool) -> None:
    """Raise ``InputError`` for processors the engine cannot honour, by name."""
    for processor in processors:
        name = type(processor).__name__
        if isinstance(processor, UnbatchedClassifierFreeGuidanceLogitsProcessor):
            raise InputError(
                "guidance_scale: runs the whole model a second time for every token, which eepass "
                "does not; leave it out, or leave out custom_generate"
            )
        plain = native and not isinstance(processor, RepetitionPenaltyLogitsProcessor)
        if approximate and not plain:
            raise InputError(
                f"{name}: needs all logits of a token, and an early exit computes but a few; "
                "use guarantee='exact'"
            )


def row_samplings(generation_config: Any, options: Sequence[dict[str, Any]]) -> list[Sampling]:
    """A ``Sampling`` for each of ``options``: greedy, or drawn with a seed of its own."""
    if not generation_config.do_sample:
        return [Sampling(**{**given, "temperature": 0.0}) for given in options]
    seeds = torch.default_generator
    if getattr(generation_config, "seed", None) is not None:
        seeds = torch.Generator().manual_seed(generation_config.seed)
    drawn = torch.randint(2**62, (len(options),), generator=seeds).tolist()
    return [
        Sampling(**{"temperature": 1.0, **given, "seed": seed})
        for given, seed in zip(options, drawn, strict=True)
    ]
