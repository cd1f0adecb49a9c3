"""What a model is trained on where no data are given: prompts and answers of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from eepass.checkpoints.models import LoadedModel
from eepass.training.answers import write_answers
from eepass.training.corpus import Example, Prompt
from eepass.training.hidden_states import Collector
from eepass.training.progress import Progress
from eepass.training.prompts import write_follow_ups, write_prompts
from eepass.training.writer import Writer

# shares of the answer tokens: sampled answers, and answers to further turns of a conversation
SAMPLED, TURNS = 0.3, 0.1
# of answer tokens, for one prompt; a little low, so that there are prompts enough
PER_PROMPT = 100
# own prompts for one further turn
FIRST_TURNS = 10


def default_own_prompts(tokens: int, given: int) -> int:
    """Prompts the model has to write, beside ``given`` ones, for ``tokens`` of answers."""
    return max(round(tokens * (1 - SAMPLED - TURNS) / PER_PROMPT) - given, 0)


class OwnData:
    """Prompts and answers in files under ``checkpoint``, and what ``collector`` makes of them."""

    def __init__(
        self, loaded: LoadedModel, checkpoint: Path, collector: Collector, progress: Progress
    ) -> None:
        self.loaded, self.checkpoint, self.progress = loaded, checkpoint, progress
        self.collector = collector
        self.own: list[Prompt] = []
        # prompts are run again with their answers
        self.prompt_writer = Writer(collector.model, loaded.stop)
        self.writer = Writer(collector.model, loaded.stop, collector.layers)

    def write(
        self, given: Sequence[Prompt], own: int, tokens: int, samples: int, temperature: float
    ) -> list[Example]:
        """About ``tokens`` of answers to ``given`` prompts and ``own`` ones that are written:
        greedy ones, and ``samples`` sampled ones to prompts that are trained on."""
        if own:
            path = self.checkpoint / "prompts.jsonl"
            self.own = write_prompts(self.prompt_writer, self.loaded, own, path, self.progress)
        prompts = [*given, *self.own]
        if not prompts:
            return []
        turns = own // FIRST_TURNS
        first = 1 - (SAMPLED if samples else 0) - (TURNS if turns else 0)
        examples = self._answers(prompts, round(first * tokens), "answers")
        if turns:
            path = self.checkpoint / "turns.jsonl"
            further = write_follow_ups(
                self.prompt_writer, self.loaded, examples, turns, path, self.progress
            )
            self.own += further
            examples += self._answers(further, round(TURNS * tokens), "answers-turns")
        # what is measured stays greedy
        fit = [prompt for prompt in [*given, *self.own] if prompt.split == "fit"]
        for sample in range(1, samples + 1):
            share = round(SAMPLED * tokens / samples)
            examples += self._answers(fit, share, f"answers-{sample}", temperature, sample)
        return examples

    def _answers(
        self,
        prompts: Sequence[Prompt],
        tokens: int,
        name: str,
        temperature: float = 0.0,
        sample: int = 0,
    ) -> list[Example]:
        return write_answers(
            self.writer, prompts, tokens, self.checkpoint / f"{name}.jsonl", self.progress,
            temperature, sample, self.collector,
        )  # fmt: skip
