"""``eepass.calibrate``: new thresholds for a model whose weights were rounded; the rest stays."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import torch

from eepass.checkpoints.artifact import Artifact, fingerprint, load_artifact
from eepass.checkpoints.models import LoadedModel, original_of
from eepass.errors import InputError
from eepass.runtime.sampling import Sampling
from eepass.training.corpus import Example, read_prompts, split_of
from eepass.training.exit_layout import Progress
from eepass.training.train import DEFAULT_PROMPTS, Silent
from eepass.training.trainer import Trainer

# rounding changes neither; without them an artefact is of another model
SAME = ("architecture", "layers", "hidden", "vocabulary")
# a threshold for 0.99 is found on so many answer tokens at least
FEWEST = 200
# answers to each prompt at most: the first greedy, the others sampled
ROUNDS, TEMPERATURE = 8, 0.7


def calibrate(
    loaded: LoadedModel,
    artifact: str | Path | Artifact,
    out: str | Path | None = None,
    prompts: str | Path | None = None,
    tokens: int = 4000,
    raw: bool = False,
    max_length: int = 512,
    longest: int = 256,
    progress: Progress | None = None,
) -> Artifact:
    """``artifact`` with its thresholds found anew on ``loaded``'s own answers; written to ``out``.

    For a model that was quantised after it was trained for: translators, predictors and the draft
    head stay as they are, in bf16, and take minutes less. ``prompts``: JSONL as for
    ``eepass.train``; those no training was fitted on are answered, densely, each up to ``longest``
    tokens, greedily and then, until there are ``tokens``, sampled. Raises ``InputError`` where
    the artefact is of a model of another shape.
    """
    began = perf_counter()
    progress = progress or Silent()
    model = original_of(loaded, "calibrate the original one, then transform that")
    trained = load_artifact(Path(artifact)) if isinstance(artifact, (str, Path)) else artifact
    found = fingerprint(model)
    for name in SAME:
        if trained.fingerprint.get(name) != found[name]:
            raise InputError(
                f"the artefact is of another model ({name} is {trained.fingerprint.get(name)!r} "
                f"there, {found[name]!r} here); run eepass train"
            )
    encoded = [loaded.encode(text, raw) for text in read_prompts(Path(prompts or DEFAULT_PROMPTS))]
    held_out = [ids for ids in encoded if split_of(ids) == "calibrate"]
    if not held_out:
        raise InputError("none of the prompts was held out of training: give more --prompts")
    with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
        trainer = Trainer(model, Path(scratch), progress, max_length)
        examples = _answered(trainer, held_out, loaded.stop, tokens, longest, progress)
        said = sum(len(example.answer) for example in examples)
        if said < FEWEST:
            raise InputError(f"{said} answer tokens are too few: give more --prompts or --tokens")
        presets, agreement = trainer.recalibrated(trained, examples)
    report = {
        **trained.report,
        "recalibrated": {
            "tokens": said,
            "from": trained.fingerprint["weights"],
            "quantised": loaded.form,
            "agreement_by_exit": agreement,
            "seconds": round(perf_counter() - began, 1),
        },
    }
    made = replace(trained, fingerprint=found, presets=presets, report=report)
    if out is not None:
        try:
            made.save(Path(out))
        except OSError as error:
            raise InputError(f"{out}: cannot be written ({error.strerror or error})") from error
    return made


def _answered(
    trainer: Trainer,
    prompts: Sequence[list[int]],
    stop: frozenset[int],
    tokens: int,
    longest: int,
    progress: Progress,
) -> list[Example]:
    """Dense answers of the compiled model: eager over quantised weights is far slower."""
    progress.begin("answering densely", tokens)
    engine = trainer.engine
    fitting = [p for p in prompts if len(p) + longest < engine.decoder.capacity]
    examples: list[Example] = []
    said = 0
    for turn in range(ROUNDS):
        for prompt in fitting:
            if said >= tokens:
                return examples
            sampling = Sampling(temperature=TEMPERATURE if turn else 0.0, seed=turn)
            answer = [step.token for step in engine.generate(prompt, longest, stop, sampling)]
            examples.append(Example(prompt, answer, "calibrate"))
            said += len(answer)
            progress.advance(len(answer))
    return examples
