"""The stage that trains the draft head: what it reads of the store, what it leaves, its report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from eepass.files import write_tensors_atomically
from eepass.training.draft_head import PASSES, fit_draft_head
from eepass.training.exit_layout import Progress
from eepass.training.hidden_states import HiddenStateStore
from eepass.training.unrolling import Lines, draft_hits, draft_states

# more than exits verify on: the whole LM head verifies what is drafted
HOT_SHARE = 1.5
# a token of a prompt counts so much of one of an answer when they are chosen
PROMPT_SHARE = 0.3


def train_draft(
    path: Path,
    store: HiddenStateStore,
    embedding: Tensor,
    lm_head: Tensor,
    hot_tokens: int,
    steps: int,
    progress: Progress,
) -> dict[str, Tensor]:
    """The tensors ``eagle.*``, from ``path`` if they are there, with a hot vocabulary of their own;
    each pass done is kept beside it."""
    unfinished = path.with_suffix(".part")
    if not path.exists():
        lines = read_lines(store, "fit")
        counts = torch.bincount(store.read("fit", "label"), minlength=len(lm_head)).float()
        counts += PROMPT_SHARE * torch.bincount(lines.token, minlength=len(lm_head))
        order = counts.argsort(descending=True, stable=True)
        hot = order[: round(HOT_SHARE * hot_tokens)].sort().values
        progress.begin("draft head", PASSES * len(lines.token))
        fitted = fit_draft_head(
            lines, embedding, lm_head[hot], progress.advance, steps, resume=unfinished
        )
        fitted["hot.ids"] = hot.to(torch.int32)
        fitted["features"] = torch.tensor(store.features, dtype=torch.int32)
        write_tensors_atomically(path, fitted)
        unfinished.unlink(missing_ok=True)
    return {f"eagle.{name}": tensor for name, tensor in load_file(path).items()}


def eagle_weights(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The draft head's own tensors by their bare names."""
    return {name[6:]: tensor for name, tensor in tensors.items() if name.startswith("eagle.")}


def read_lines(store: HiddenStateStore, split: str) -> Lines:
    return Lines(*(store.read(split, f"line.{name}") for name in Lines._fields))


def answer_states(
    tensors: Mapping[str, Tensor], store: HiddenStateStore, split: str, embedding: Tensor
) -> Tensor:
    """The draft head's states [n, H] at the answer tokens of the store."""
    states = draft_states(eagle_weights(tensors), read_lines(store, split), embedding)
    return states[store.read(split, "line.answer")]


def report_draft(
    tensors: Mapping[str, Tensor],
    store: HiddenStateStore,
    embedding: Tensor,
    lm_head: Tensor,
    steps: int,
) -> dict[str, Any]:
    """What it was trained on, and its hits on answers held out, by step."""
    weights, lines = eagle_weights(tensors), read_lines(store, "calibrate")
    hot, dense = weights["hot.ids"].long(), store.read("calibrate", "label").long()
    label = torch.full((len(lines.token),), -1)
    label[store.read("calibrate", "line.answer")] = dense
    return {
        "features": list(store.features),
        "hot_tokens": len(hot),
        "hot_coverage": float(torch.isin(dense, hot).float().mean()),
        "tokens": len(store.read("fit", "line.token")),
        "passes": PASSES,
        "steps": steps,
        "hits": draft_hits(weights, lines, label, embedding, hot, lm_head[hot], steps),
    }
