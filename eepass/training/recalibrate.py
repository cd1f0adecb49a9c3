"""``eepass.calibrate``: new thresholds for a model whose weights were rounded; the rest stays."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from itertools import product
from pathlib import Path
from time import perf_counter

import torch

from eepass.checkpoints.artifact import Artifact, fingerprint
from eepass.checkpoints.draft_codes import in_dtype
from eepass.checkpoints.fitting_artifact import artifact_for
from eepass.checkpoints.models import LoadedModel, original_of
from eepass.errors import InputError
from eepass.files import writing
from eepass.runtime.sampling import Sampling
from eepass.training.card import write_card
from eepass.training.corpus import Example, Prompt, mixed, read_kinds, split_of
from eepass.training.dense_model import HOT_TOKENS, DenseModel
from eepass.training.exits import PresetExits
from eepass.training.hidden_states import HiddenStateStore, collect
from eepass.training.progress import NoProgress, Progress
from eepass.training.train import DEFAULT_PROMPTS
from eepass.training.writer import Task, Writer

# a threshold for 0.99 is found on so many answer tokens at least
FEWEST = 200
# at most so many answers to each prompt: the first greedy, the others sampled
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
    """``artifact`` with new thresholds, found on ``loaded``'s own answers; written to ``out``.

    For a model that was quantised after the artefact was trained: translators, predictors and the
    draft head stay as they are, in bf16, which saves minutes. ``prompts``: JSONL as for
    ``eepass.train``, better with kinds of text; the held-out ones are answered densely, each up to
    ``longest`` tokens, greedily and then, until there are ``tokens``, sampled. Raises
    ``InputError`` where the artefact is of a model of another shape.
    """
    began = perf_counter()
    progress = progress or NoProgress()
    model = original_of(loaded, "calibrate the original one, then transform that")
    trained = artifact_for(model, artifact, "the artefact", same_weights=False)
    if not trained.presets:
        raise InputError("the artefact has a draft head alone, and that needs no thresholds")
    held_out = held_out_prompts(loaded, prompts, raw)
    with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
        dense = DenseModel(model, max_length)
        examples = answer(dense, held_out, loaded.stop, tokens, longest, progress)
        answered = sum(len(example.answer) for example in examples)
        exits = _exits(dense, trained, examples, Path(scratch), progress)
        costs = dense.costs(HOT_TOKENS)
        found = {
            name: preset.calibrated(trained.predictors(name), trained.exits(name), costs)
            for name, preset in exits.items()
        }
    recalibrated = {
        "tokens": answered,
        "from": trained.fingerprint["weights"],
        "quantised": loaded.quantization,
        "agreement_by_exit": {name: agreement for name, (_, agreement) in found.items()},
        "seconds": round(perf_counter() - began, 1),
    }
    made = replace(
        trained,
        fingerprint=fingerprint(model),
        presets={name: part for name, (part, _) in found.items()},
        report={**trained.report, "recalibrated": recalibrated},
    )
    if out is not None:
        with writing(Path(out)):
            made.save(Path(out))
            write_card(Path(out), loaded, made)
    return made


def held_out_prompts(loaded: LoadedModel, prompts: str | Path | None, raw: bool) -> list[Prompt]:
    """Those of ``prompts`` that ``eepass.train`` leaves out; ``InputError`` if it leaves none."""
    texts = read_kinds(Path(prompts or DEFAULT_PROMPTS))
    encoded = [(loaded.encode(text, raw), kind) for text, kind in texts]
    every = [Prompt(ids, kind, split_of(ids)) for ids, kind in encoded]
    held_out = [prompt for prompt in every if prompt.split == "calibrate"]
    if not held_out:
        raise InputError("none of the prompts was held out of training: give more --prompts")
    return held_out


def answer(
    model: DenseModel,
    prompts: Sequence[Prompt],
    stop: frozenset[int],
    tokens: int,
    longest: int,
    progress: Progress,
) -> list[Example]:
    """Dense answers, greedy and then sampled; ``InputError`` where they are too few."""
    progress.begin("answering densely", tokens)
    # so that all kinds are there wherever it ends
    fitting = [p for p in mixed(prompts) if len(p.ids) + longest <= model.max_length]
    turns = [*product(range(ROUNDS), fitting)]
    tasks = (
        Task(prompt.ids, longest, Sampling(temperature=TEMPERATURE if turn else 0.0, seed=turn))
        for turn, prompt in turns
    )
    examples: list[Example] = []
    answered = 0
    with closing(Writer(model, stop).write(tasks)) as written:
        for (turn, prompt), (answer, _) in zip(turns, written, strict=False):
            examples.append(Example(prompt.ids, answer, prompt.split, prompt.kind, not turn))
            answered += len(answer)
            progress.advance(len(answer))
            if answered >= tokens:
                break
    if answered < FEWEST:
        raise InputError(f"{answered} answer tokens are too few: give more --prompts or --tokens")
    return examples


def _exits(
    model: DenseModel,
    artifact: Artifact,
    examples: Sequence[Example],
    folder: Path,
    progress: Progress,
) -> dict[str, PresetExits]:
    """The exits of each preset of ``artifact`` on the hidden states of ``examples``."""
    # the draft head runs in the model's dtype, as in the engine
    tensors = in_dtype(artifact.tensors, model.decoder.dtype)
    tensors.setdefault("eagle.hot.ids", tensors["hot.ids"])
    layers = {part.draft_layer for part in artifact.presets.values()}
    layers = layers.union(*map(artifact.exits, artifact.presets))
    features = tensors["eagle.features"].tolist() if "eagle.features" in tensors else ()
    store = HiddenStateStore(folder, sorted(layers - {0, model.decoder.num_layers}), features)
    collect(model, examples, store, progress)
    return {
        name: PresetExits(model, store, tensors, part.draft_layer, part.draft_tokens)
        for name, part in artifact.presets.items()
    }
