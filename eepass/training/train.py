"""``eepass.train``: an artefact for a model, from prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from eepass.checkpoints.artifact import Artifact, fingerprint
from eepass.checkpoints.models import LoadedModel, original_of
from eepass.errors import InputError
from eepass.training.corpus import (
    Example,
    generate_answers,
    generate_prompts,
    read_answers,
    read_prompts,
    split_of,
)
from eepass.training.draft_head import STEPS
from eepass.training.progress import NoProgress, Progress
from eepass.training.resume import RecordFile, check_request
from eepass.training.trainer import Trainer

DEFAULT_PROMPTS = Path(__file__).parents[1] / "data" / "prompts.jsonl"


def train(
    loaded: LoadedModel,
    out: str | Path,
    prompts: str | Path | None = None,
    tokens: int = 200_000,
    answers: str | Path | None = None,
    raw: bool = False,
    max_length: int = 512,
    samples: int = 0,
    temperature: float = 0.7,
    draft: Literal["eagle", "none"] = "eagle",
    steps: int = STEPS,
    own_prompts: int = 0,
    progress: Progress | None = None,
) -> Artifact:
    """Train translators, draft head, predictors and thresholds for ``loaded``; write ``out``.

    ``prompts``: JSONL, ``{"prompt": ...}`` a line; the shipped set otherwise. ``tokens``: answer
    tokens to generate. ``answers``: JSONL of the model's own answers, ``{"prompt": line of the
    prompts file from 0, "answer": [token ids]}``, instead of generating. ``samples``: further
    answers to each prompt of the first split, sampled at ``temperature``. ``draft``: whether to
    train a draft head and the preset ``paper``, which needs it; ``steps``: how far it is unrolled.
    ``own_prompts``: prompts that the model writes itself, beside those given, answered too. A run
    that was stopped is resumed from ``out/checkpoint``. Raises ``InputError`` for bad input.
    """
    progress = progress or NoProgress()
    original_of(loaded, "train on the original one, then transform that with what was trained")
    folder = Path(out)
    checkpoint = folder / "checkpoint"
    encoded = [
        loaded.encode(prompt, raw) for prompt in read_prompts(Path(prompts or DEFAULT_PROMPTS))
    ]
    request = {
        "model": fingerprint(loaded.model)["weights"],
        "prompts": len(encoded),
        "answers": str(Path(answers).name) if answers else None,
        "tokens": None if answers else tokens,
        "max_length": max_length,
        "samples": samples,
        "temperature": temperature if samples else None,
        "draft": draft,
        "steps": steps,
        "own_prompts": own_prompts,
    }
    try:
        checkpoint.mkdir(parents=True, exist_ok=True)
        check_request(checkpoint, request)
        examples: list[Example] = []
        if answers is not None:
            path = Path(answers)
            if not path.is_file():
                raise InputError(f"{path}: no such file")
            examples = read_answers(path, encoded, loaded.model.config.vocab_size)
        own: list[list[int]] = []
        if own_prompts:
            own = _own_prompts(loaded, own_prompts, checkpoint / "prompts.jsonl", progress)
        unanswered = own if answers is not None else encoded + own
        if unanswered:
            path = checkpoint / "answers.jsonl"
            examples += _own_answers(loaded, unanswered, tokens, path, progress, 0.0)
        # sampled answers go into the first split alone: what is measured stays greedy
        fit = [prompt for prompt in encoded + own if split_of(prompt) == "fit"]
        for sampled in range(1, samples + 1):
            path = checkpoint / f"answers-{sampled}.jsonl"
            examples += _own_answers(loaded, fit, tokens, path, progress, temperature)
        if {e.split for e in examples} != {"fit", "predict", "calibrate"}:
            raise InputError(
                f"{len(examples)} answers are too few: give more prompts or raise --tokens"
            )
        trainer = Trainer(loaded.model, checkpoint, progress, max_length, draft=draft, steps=steps)
        artifact = trainer.run(examples)
        artifact.save(folder)
    except OSError as error:
        raise InputError(
            f"{folder}: cannot be written ({error.strerror or error}); what was done before is "
            "kept: make room and run the same command again"
        ) from error
    return artifact


def _own_prompts(
    loaded: LoadedModel, count: int, path: Path, progress: Progress
) -> list[list[int]]:
    """``count`` prompts of the model's own; those in ``path`` are not written again."""
    file = RecordFile(path)
    done = len(file.records)
    progress.begin("writing prompts", count)
    progress.advance(done)

    def save(batch: list[list[int]]) -> None:
        file.extend({"prompt": prompt} for prompt in batch)
        progress.advance(len(batch))

    generate_prompts(loaded.model, loaded.turn(), loaded.stop, count - done, save)
    return [record["prompt"] for record in file.records]


def _own_answers(
    loaded: LoadedModel,
    prompts: Sequence[list[int]],
    tokens: int,
    path: Path,
    progress: Progress,
    temperature: float,
) -> list[Example]:
    """About ``tokens`` tokens of answers; those in ``path`` are not generated again."""
    file = RecordFile(path)
    done = sum(len(record["answer"]) for record in file.records)
    progress.begin("generating answers", tokens)
    progress.advance(done)
    answered = {tuple(record["prompt"]) for record in file.records}
    left = [prompt for prompt in prompts if tuple(prompt) not in answered]

    def save(batch: list[Example]) -> None:
        file.extend({"prompt": example.prompt, "answer": example.answer} for example in batch)
        progress.advance(sum(len(example.answer) for example in batch))

    if done < tokens and left:
        generate_answers(loaded.model, left, loaded.stop, tokens - done, save, temperature)
    return [Example(r["prompt"], r["answer"], split_of(r["prompt"])) for r in file.records]
