"""``eepass.train``: an artefact for a model, from prompts; each stage can be resumed."""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from eepass.checkpoints.artifact import Artifact, fingerprint
from eepass.checkpoints.fitting_artifact import artifact_for
from eepass.checkpoints.models import LoadedModel, original_of
from eepass.checkpoints.quantized_weights import quantization_of
from eepass.errors import InputError
from eepass.training import corpus
from eepass.training.card import write_card
from eepass.training.corpus import HELD_OUT, Example, Prompt
from eepass.training.draft_head import STEPS
from eepass.training.forecast import forecast
from eepass.training.own_data import OwnData, default_own_prompts
from eepass.training.progress import NoProgress, Progress, check_request, claimed
from eepass.training.prompts import topics
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
    samples: int = 1,
    temperature: float = 0.7,
    draft: Literal["eagle", "none"] = "eagle",
    steps: int = STEPS,
    own_prompts: int | None = None,
    progress: Progress | None = None,
    start: str | Path | None = None,
    keep_exits: bool = False,
) -> Artifact:
    """Train translators, draft head, predictors and thresholds for ``loaded``; write ``out``.

    ``prompts``: JSONL, ``{"prompt": ..., "kind": ...}`` a line, the kind optional; the shipped set
    otherwise. ``tokens``: answer tokens to generate. ``answers``: JSONL of the model's own answers,
    ``{"prompt": line of the prompts file from 0, "answer": [token ids]}``, instead of generating.
    ``samples``: further answers to each prompt of the first split, sampled at ``temperature``, in
    the last third of the tokens. ``draft``: whether to train a draft head and the preset ``paper``,
    which needs it; ``steps``: how far it is unrolled. ``own_prompts``: prompts that the model
    writes itself, of many kinds, beside those given, answered too; by default as many as the tokens
    need, none beside ``prompts`` or ``answers``. ``start``: an artefact for a model of this form,
    whose draft head is trained further instead of a new one; ``keep_exits``: its translators, and
    the predictors and thresholds of its preset ``default``, are kept as they are, if it is for
    these weights. A run that was stopped is resumed from ``out/checkpoint``. Raises ``InputError``
    for bad input.
    """
    if keep_exits and start is None:
        raise InputError("the exits of which artefact are to be kept? give it as start")
    if start is not None and draft == "none":
        raise InputError("start is for training a draft head, and draft='none' trains none")
    progress = progress or NoProgress()
    original_of(loaded, "train on the original one, then transform that with what was trained")
    folder = Path(out)
    checkpoint = folder / "checkpoint"
    texts = corpus.read_kinds(Path(prompts or DEFAULT_PROMPTS))
    given = [_given(loaded.encode(text, raw), kind) for text, kind in texts]
    examples: list[Example] = []
    if answers is not None:
        examples = corpus.read_answers(Path(answers), given, loaded.model.config.vocab_size)
    if own_prompts is None:
        alone = prompts is None and answers is None and loaded.converses
        own_prompts = default_own_prompts(tokens, len(given)) if alone else 0
    request = {
        "model": fingerprint(loaded.model)["weights"],
        "quantized": quantization_of(loaded.model),
        "prompts": _hash(repr(given).encode()),
        "answers": _hash(repr(examples).encode()) if answers is not None else None,
        "tokens": None if answers is not None else tokens,
        "max_length": max_length,
        "samples": samples,
        "temperature": temperature if samples else None,
        "draft": draft,
        "steps": steps,
        "own_prompts": own_prompts,
    }
    first = None
    if start is not None:
        first = artifact_for(loaded.model, start, str(start), same_weights=keep_exits)
        parts = [f"{n} {_hash(_bytes(t))}" for n, t in sorted(first.tensors.items())]
        request["start"] = _hash("\n".join(parts).encode())
        request["keep_exits"] = keep_exits
    held = ExitStack()
    try:
        held.enter_context(claimed(checkpoint, folder))
        check_request(checkpoint, request)
        trainer = Trainer(loaded.model, checkpoint, progress, max_length, draft=draft, steps=steps)
        if first is not None:
            trainer.start_from(first, str(start), keep_exits)
        progress.say(forecast(trainer.model, 0 if answers is not None else tokens, own_prompts))
        data = OwnData(loaded, checkpoint, trainer.collector, progress)
        if answers is not None:
            trainer.collector.catch_up(examples)
        unanswered = [] if answers is not None else given
        examples += data.write(unanswered, own_prompts, tokens, samples, temperature)
        _refuse_too_few(examples, [*unanswered, *data.own], tokens)
        artifact = trainer.run(examples)
        artifact.save(folder)
        write_card(folder, loaded, artifact)
    except OSError as error:
        if error.filename and not Path(error.filename).is_relative_to(folder):
            # compiled code, say, that has no room in a cache
            raise
        room = "make room and " if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise InputError(
            f"{folder}: cannot be written ({error.strerror or error}); what was done before is "
            f"kept: {room}run the same command again"
        ) from error
    finally:
        held.close()
    return artifact


def _given(ids: list[int], kind: str) -> Prompt:
    held_out = kind in {topic.kind for topic in topics() if topic.held_out}
    return Prompt(ids, kind, HELD_OUT if held_out else corpus.split_of(ids))


def _refuse_too_few(examples: Sequence[Example], prompts: Sequence[Prompt], tokens: int) -> None:
    """Raise ``InputError`` where a split has no answers, saying what there should be more of."""
    if {example.split for example in examples} >= {split for split, _ in corpus.SPLITS}:
        return
    made = sum(len(example.answer) for example in examples)
    left = {tuple(prompt.ids) for prompt in prompts} - {tuple(e.prompt) for e in examples}
    raise InputError(
        f"{len(examples)} answers of {made} tokens are too few: "
        + (f"raise --tokens above {max(made, tokens)}" if left else "give more prompts")
    )


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]
