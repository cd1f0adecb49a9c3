"""The stage that trains the draft head: its data in the store, its tensors, its report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eepass.training.dense_model import DenseModel
from eepass.training.draft_head import PASSES, fit_draft_head
from eepass.training.hidden_states import HiddenStateStore
from eepass.training.progress import Progress
from eepass.training.resume import made_once
from eepass.training.unrolling import Lines, draft_hits, draft_states

# larger than for exits: the whole LM head verifies these draft tokens
HOT_SHARE = 1.5
# a token of a prompt counts this much of one of an answer when the hot tokens are chosen
PROMPT_SHARE = 0.3


def train_draft(
    path: Path,
    store: HiddenStateStore,
    model: DenseModel,
    hot_tokens: int,
    steps: int,
    progress: Progress,
) -> dict[str, Tensor]:
    """The tensors ``eagle.*``, from ``path`` if they are there, with a hot vocabulary of their own;
    each finished pass is saved beside it."""
    unfinished = path.with_suffix(".part")

    def fit() -> dict[str, Tensor]:
        lines, vocabulary = read_lines(store, "fit"), len(model.lm_head)
        counts = torch.bincount(store.labels("fit"), minlength=vocabulary).float()
        counts += PROMPT_SHARE * torch.bincount(lines.token, minlength=vocabulary)
        order = counts.argsort(descending=True, stable=True)
        hot = order[: round(HOT_SHARE * hot_tokens)].sort().values
        progress.begin("draft head", PASSES * len(lines.token))
        fitted = fit_draft_head(
            lines, model.embedding, model.lm_head[hot], progress.advance, steps, resume=unfinished
        )
        fitted["hot.ids"] = hot.to(torch.int32)
        fitted["features"] = torch.tensor(store.features, dtype=torch.int32)
        return fitted

    stored = made_once(path, fit)
    unfinished.unlink(missing_ok=True)
    return {f"eagle.{name}": tensor for name, tensor in stored.items()}


def draft_head_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The draft head's tensors without their prefix."""
    prefix = "eagle."
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def read_lines(store: HiddenStateStore, split: str) -> Lines:
    return Lines(*(store.read(split, f"line.{name}") for name in Lines._fields))


def answer_states(
    tensors: Mapping[str, Tensor], store: HiddenStateStore, split: str, embedding: Tensor
) -> Tensor:
    """The draft head's states [n, H] at the answer tokens of the store."""
    states = draft_states(draft_head_of(tensors), read_lines(store, split), embedding)
    return states[store.read(split, "line.answer")]


def report_draft(
    tensors: Mapping[str, Tensor], store: HiddenStateStore, model: DenseModel, steps: int
) -> dict[str, Any]:
    """What the draft head is trained on, and its hits on held-out answers, step by step."""
    weights, lines = draft_head_of(tensors), read_lines(store, "calibrate")
    hot, dense = weights["hot.ids"].long(), store.labels("calibrate")
    label = torch.full((len(lines.token),), -1)
    label[store.read("calibrate", "line.answer")] = dense
    hot_head = model.lm_head[hot]
    return {
        "features": list(store.features),
        "hot_tokens": len(hot),
        "hot_coverage": float(torch.isin(dense, hot).float().mean()),
        "tokens": len(store.read("fit", "line.token")),
        "passes": PASSES,
        "steps": steps,
        "hits": draft_hits(weights, lines, label, model.embedding, hot, hot_head, steps),
    }
