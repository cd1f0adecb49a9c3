"""The model's own answers to prompts, greedy or sampled, kept on disk as they are made."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from eepass.lengths import refuse_longer
from eepass.runtime.sampling import GREEDY, Sampling
from eepass.training.corpus import Example, Prompt, hash_of, mixed
from eepass.training.hidden_states import Collector
from eepass.training.progress import Progress, RecordFile
from eepass.training.writer import Task, Writer

LONGEST = 224
# a prompt that leaves less room is not answered
SHORTEST = 8


def write_answers(
    writer: Writer,
    prompts: Sequence[Prompt],
    tokens: int,
    path: Path,
    progress: Progress,
    temperature: float = 0.0,
    sample: int = 0,
    collector: Collector | None = None,
    longest: int = LONGEST,
) -> list[Example]:
    """About ``tokens`` tokens of the model's answers, greedy or the ``sample``-th at a
    ``temperature``; those in ``path`` are not made again.

    ``collector`` is given each example with the hidden states that were computed for it. Raises
    ``InputError`` for a prompt as long as the model's maximum length.
    """
    model = writer.model
    for prompt in prompts:
        refuse_longer(model.original, len(prompt.ids) + 1, "a prompt and its answer")
    file = RecordFile(path)
    examples = [
        Example(r["prompt"], r["answer"], r["split"], r["kind"], not temperature)
        for r in file.records
    ]
    if collector is not None:
        collector.catch_up(examples)
    made = sum(len(example.answer) for example in examples)
    progress.begin("sampling answers" if temperature else "generating answers", tokens)
    progress.advance(made)
    answered = {tuple(example.prompt) for example in examples}
    left = [
        prompt
        for prompt in mixed(prompts)
        if tuple(prompt.ids) not in answered and len(prompt.ids) + SHORTEST <= model.max_length
    ]
    if made >= tokens:
        return examples
    tasks = (
        Task(p.ids, min(longest, model.max_length - len(p.ids)), _sampling(p, temperature, sample))
        for p in left
    )
    with closing(writer.write(tasks)) as written:
        for prompt, (answer, hidden) in zip(left, written, strict=False):
            example = Example(prompt.ids, answer, prompt.split, prompt.kind, not temperature)
            examples.append(example)
            file.append(
                {"prompt": prompt.ids, "kind": prompt.kind, "split": prompt.split, "answer": answer}
            )
            if collector is not None:
                collector.add(example, hidden)
            made += len(answer)
            progress.advance(len(answer))
            if made >= tokens:
                break
    return examples


def _sampling(prompt: Prompt, temperature: float, sample: int) -> Sampling:
    """Drawn from a seed of its own, so that a run that is resumed draws the same."""
    if not temperature:
        return GREEDY
    seed = int.from_bytes(hash_of([sample, *prompt.ids])[:6], "big")
    return Sampling(temperature, seed=seed)
