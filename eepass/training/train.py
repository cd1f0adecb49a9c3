"""``eepass.train``: an artefact for a model, from prompts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from eepass.checkpoints.artifact import Artifact, fingerprint
from eepass.checkpoints.models import LoadedModel, original_of
from eepass.errors import InputError
from eepass.files import write_text_atomically
from eepass.training.corpus import (
    Example,
    generate_answers,
    generate_prompts,
    read_answers,
    read_prompts,
    split_of,
)
from eepass.training.draft_head import STEPS
from eepass.training.exit_layout import Progress
from eepass.training.trainer import Trainer

DEFAULT_PROMPTS = Path(__file__).parents[1] / "data" / "prompts.jsonl"


class Silent:
    """A progress that nobody watches."""

    def begin(self, stage: str, total: int) -> None: ...

    def advance(self, amount: int) -> None: ...


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
    answers to each prompt trained on, sampled at ``temperature``. ``draft``: whether to train a
    draft head and the preset ``paper``, which needs it; ``steps``: how far it is unrolled.
    ``own_prompts``: prompts that the model writes itself, beside those given, answered too. What a
    run that was stopped has done is taken up from ``out/checkpoint``. Raises ``InputError`` for
    bad input.
    """
    progress = progress or Silent()
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
        _same_request(checkpoint, request)
        if answers is not None:
            path = Path(answers)
            if not path.is_file():
                raise InputError(f"{path}: no such file")
            examples = read_answers(path, encoded, loaded.model.config.vocab_size)
        else:
            examples = []
        own: list[list[int]] = []
        if own_prompts:
            own = _own_prompts(loaded, own_prompts, checkpoint / "prompts.jsonl", progress)
        unanswered = own if answers is not None else encoded + own
        encoded += own
        path = checkpoint / "answers.jsonl"
        if unanswered:
            examples += _own_answers(loaded, unanswered, tokens, path, progress, 0.0)
        # sampled answers are trained on alone: what is measured stays greedy
        asked = [prompt for prompt in encoded if split_of(prompt) == "fit"]
        for sampled in range(1, samples + 1):
            part = path.with_name(f"answers-{sampled}.jsonl")
            examples += _own_answers(loaded, asked, tokens, part, progress, temperature)
        if {e.split for e in examples} != {"fit", "predict", "calibrate"}:
            raise InputError(
                f"{len(examples)} answers are too few: give more prompts or raise --tokens"
            )
        trainer = Trainer(loaded.model, checkpoint, progress, max_length, draft=draft, steps=steps)
        with torch.no_grad():
            artifact = trainer.run(examples)
        artifact.save(folder)
    except OSError as error:
        raise InputError(
            f"{folder}: cannot be written ({error.strerror or error}); what was done before is "
            "kept: make room and run the same command again"
        ) from error
    return artifact


def _same_request(checkpoint: Path, request: dict[str, object]) -> None:
    path = checkpoint / "request.json"
    if path.exists():
        before = json.loads(path.read_text())
        changed = [name for name, value in request.items() if before.get(name) != value]
        if changed:
            raise InputError(
                f"{checkpoint}: holds a training with other {', '.join(changed)}; "
                "delete it or choose another --out"
            )
    else:
        write_text_atomically(path, json.dumps(request))


def _own_prompts(
    loaded: LoadedModel, count: int, path: Path, progress: Progress
) -> list[list[int]]:
    """Written once; the file grows by whole batches, and a run taken up goes on after them."""
    prompts: list[list[int]] = []
    if path.exists():
        prompts = [json.loads(line)["prompt"] for line in path.read_text().splitlines()]
    progress.begin("writing prompts", count)
    progress.advance(len(prompts))

    def keep(batch: list[list[int]]) -> None:
        prompts.extend(batch)
        write_text_atomically(path, "".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
        progress.advance(len(batch))

    generate_prompts(loaded.model, loaded.turn(), loaded.stop, count - len(prompts), keep)
    return prompts


def _own_answers(
    loaded: LoadedModel,
    prompts: Sequence[list[int]],
    tokens: int,
    path: Path,
    progress: Progress,
    temperature: float,
) -> list[Example]:
    """Generated once; the file grows by whole batches, and a run taken up goes on after them."""
    examples = []
    if path.exists():
        for line in path.read_text().splitlines():
            record = json.loads(line)
            examples.append(Example(record["prompt"], record["answer"], split_of(record["prompt"])))
    done = sum(len(example.answer) for example in examples)
    progress.begin("generating answers", tokens)
    progress.advance(done)
    answered = {tuple(example.prompt) for example in examples}
    left = [prompt for prompt in prompts if tuple(prompt) not in answered]

    def keep(batch: list[Example]) -> None:
        examples.extend(batch)
        lines = [json.dumps({"prompt": e.prompt, "answer": e.answer}) for e in examples]
        write_text_atomically(path, "\n".join(lines) + "\n")
        progress.advance(sum(len(e.answer) for e in batch))

    if done < tokens and left:
        generate_answers(loaded.model, left, loaded.stop, tokens - done, keep, temperature)
    return examples
