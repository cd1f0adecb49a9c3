"""Hidden states of the model along its own answers, in shards on disk.

Half a million tokens at thirty layers are 17 GB: a shard holds some ten thousand tokens, training
reads the states of one layer and one split at a time, and only what is read is stored: translators
are fitted on some layers and on so many tokens, predictors and thresholds need more layers of fewer
tokens. Of the dense logits only the normed state ``z`` is stored (the losses compute hot logits
from it) and the dense argmax.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from eepass.files import write_tensors_atomically, write_text_atomically
from eepass.reading import parse_json
from eepass.training.corpus import Example
from eepass.training.dense_model import DenseModel
from eepass.training.progress import Progress
from eepass.training.unrolling import Lines

SHARD_TOKENS = 16_384
# answer tokens of the split ``fit`` whose hidden states between layers are stored
MOST_FIT = 250_000
# shards that hold hidden states between layers
FITTED = "fitted"


class HiddenStateStore:
    """Shards under ``folder``, with one row per answer token:

    ``boundary.<layer>`` [n, H]: the hidden state after that layer; ``z`` [n, H]: the last one,
    normed; ``token``: the token at this position; ``label``: the dense token that follows.

    And one row per token of prompt and answer, for the draft head: ``line.token``;
    ``line.features`` [m, F * H]: z and the hidden states after the layers ``features``;
    ``line.place``; ``line.answer``: whether it is among the rows above; ``line.kind``: the kind of
    text, its place in ``kinds``.

    Of the split ``fit`` there are only the layers ``fitted``, and ``boundary`` and the ``z`` that
    belong to it only of the first answers, about ``MOST_FIT`` tokens.
    """

    def __init__(
        self,
        folder: Path,
        layers: Sequence[int],
        features: Sequence[int] = (),
        fitted: Sequence[int] | None = None,
    ) -> None:
        self.folder = folder
        self.layers, self.features = tuple(layers), tuple(features)
        self.fitted = self.layers if fitted is None else tuple(fitted)
        folder.mkdir(parents=True, exist_ok=True)
        self._rows: dict[str, list[dict[str, Tensor]]] = {}
        done = self._done()
        self.kinds: list[str] = list(done.get("kinds", ()))
        self._fit_tokens = int(done.get("fitted", 0))

    @property
    def examples_done(self) -> int:
        return int(self._done().get("examples", 0))

    def read(self, split: str, name: str) -> Tensor:
        """One tensor of one split over all its shards."""
        # z and what goes with it
        fitted = name == "z" or name.startswith("boundary.")
        parts = []
        for path in self._shards(split, FITTED if fitted else ""):
            with safe_open(path, "pt") as shard:
                if name != "z":
                    parts.append(shard.get_tensor(name))
                    continue
                features, answer = (shard.get_tensor(f"line.{n}") for n in ("features", "answer"))
                width = features.shape[1] // (1 + len(self.features))
                parts.append(features[answer, :width])
        return torch.cat(parts)

    def labels(self, split: str) -> Tensor:
        """The dense tokens [n]; none for a split without answers."""
        if not self._shards(split):
            return torch.zeros(0, dtype=torch.long)
        return self.read(split, "label").long()

    def lines(self, split: str) -> Lines:
        return Lines(*(self.read(split, f"line.{name}") for name in Lines._fields))

    def lines_by_kind(self, split: str) -> dict[str, tuple[Lines, Tensor]]:
        """The lines of each kind of text, and the dense token after each of their tokens, -1 where
        it is not among the answers'."""
        lines, kind = self.lines(split), self.read(split, "line.kind")
        label = torch.full((len(lines.token),), -1)
        label[self.read(split, "line.answer")] = self.labels(split)
        found = {}
        for number in kind.unique().tolist():
            own = kind == number
            found[self.kinds[number]] = Lines(*(part[own] for part in lines)), label[own]
        return found

    def texts(self, split: str) -> tuple[Tensor, Tensor]:
        """Of each answer token [n], the number of its text and the number of that text's kind."""
        answer = self.read(split, "line.answer")
        text = (self.read(split, "line.place") == 0).cumsum(0)
        return text[answer], self.read(split, "line.kind")[answer]

    def layers_for(self, split: str) -> tuple[int, ...]:
        """The layers after which hidden states of the next example of ``split`` are stored."""
        if split != "fit":
            return self.layers
        return self.fitted if self._fit_tokens < MOST_FIT else ()

    def kind(self, name: str) -> int:
        """The number of a kind of text."""
        if name not in self.kinds:
            self.kinds.append(name)
        return self.kinds.index(name)

    def add(self, split: str, rows: dict[str, Tensor]) -> None:
        """``rows``: as ``rows_of`` makes them."""
        if split == "fit":
            self._fit_tokens += len(rows["token"])
        self._rows.setdefault(split, []).append(rows)

    def flush(self, examples_done: int) -> None:
        """Write what was added; only then count its examples as done."""
        for split, added in self._rows.items():
            # in a shard all rows have the same tensors
            by_names: dict[frozenset[str], list[dict[str, Tensor]]] = {}
            for rows in added:
                by_names.setdefault(frozenset(rows), []).append(rows)
            for names, parts in by_names.items():
                fitted = any(name.startswith("boundary.") for name in names)
                joined = {name: torch.cat([rows[name] for rows in parts]) for name in names}
                kind = FITTED if fitted else "lines"
                path = self.folder / f"{split}-{examples_done:07d}.{kind}.safetensors"
                write_tensors_atomically(path, joined)
        self._rows.clear()
        done = {"examples": examples_done, "kinds": self.kinds, "fitted": self._fit_tokens}
        write_text_atomically(self.folder / "done.json", json.dumps(done))

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(path.stat().st_size for path in self.folder.glob("*.safetensors"))

    @property
    def unwritten(self) -> int:
        """Answer tokens added since the last flush."""
        return sum(len(row["token"]) for rows in self._rows.values() for row in rows)

    def _shards(self, split: str, kind: str = "") -> list[Path]:
        return sorted(self.folder.glob(f"{split}-*{kind}.safetensors"))

    def _done(self) -> dict[str, Any]:
        path = self.folder / "done.json"
        return dict(parse_json(path.read_bytes())) if path.exists() else {}


class Collector:
    """Puts examples into ``store`` in their order, but those that it holds from an earlier run."""

    def __init__(self, model: DenseModel, store: HiddenStateStore, progress: Progress) -> None:
        self.model, self.store, self.progress = model, store, progress
        self.taken = 0

    @property
    def layers(self) -> set[int]:
        """After which hidden states are wanted."""
        return {*self.store.layers, *self.store.features, self.model.decoder.num_layers}

    def add(self, example: Example, hidden: Mapping[int, Tensor]) -> None:
        """``hidden`` [n, H] by layer, of all tokens of the example but the last."""
        self.taken += 1
        if self.taken <= self.store.examples_done:
            return
        if len(hidden[self.model.decoder.num_layers]) >= len(example.prompt):
            self.store.add(example.split, self._rows_of(example, hidden))
        if self.store.unwritten >= SHARD_TOKENS:
            self.store.flush(self.taken)

    @torch.no_grad()
    def catch_up(self, examples: Sequence[Example]) -> None:
        """Run the model over ``examples`` that are there without hidden states: those of a file,
        or of a run that was stopped before it stored them."""
        lengths = [len(example.prompt) + len(example.answer) for example in examples]
        stored = min(max(self.store.examples_done - self.taken, 0), len(examples))
        self.taken += stored
        if stored == len(examples):
            return
        self.progress.begin("collecting hidden states", sum(lengths))
        self.progress.advance(sum(lengths[:stored]))
        for example, length in zip(examples[stored:], lengths[stored:], strict=True):
            self.add(example, self._run(example))
            self.progress.advance(length)

    def finish(self, examples: Sequence[Example]) -> None:
        """``examples``: all of them; what was not collected on the way is collected, and all of it
        is written."""
        self.catch_up(examples[self.taken :])
        self.store.flush(len(examples))

    def _run(self, example: Example) -> dict[int, Tensor]:
        ids = [*example.prompt, *example.answer][: self.model.max_length]
        parts: dict[int, list[Tensor]] = {layer: [] for layer in self.layers}

        def on_layer(layer: int, hidden: Tensor) -> None:
            if layer in parts:
                parts[layer].append(hidden[0].clone())

        self.model.engine.prefill(ids, on_layer)
        return {layer: torch.cat(chunks)[:-1] for layer, chunks in parts.items()}

    def _rows_of(self, example: Example, hidden: Mapping[int, Tensor]) -> dict[str, Tensor]:
        """The rows of one example; the last token of its prompt predicts the first of its
        answer."""
        store, last, first = self.store, hidden[self.model.decoder.num_layers], -1
        first += len(example.prompt)
        tokens = torch.tensor([*example.prompt, *example.answer][: len(last)], dtype=torch.int32)
        places = torch.arange(len(last), dtype=torch.int32)
        z = self.model.lens.norm(last)
        if example.greedy:
            label = torch.tensor(example.answer[: len(last) - first])
        else:
            label = self.model.best_tokens(last[first:])
        return {
            **{f"boundary.{n}": hidden[n][first:].clone() for n in store.layers_for(example.split)},
            "token": tokens[first:].clone(),
            "label": label.to(torch.int32),
            "line.token": tokens,
            "line.place": places,
            "line.features": torch.cat([z, *(hidden[n] for n in store.features)], -1),
            "line.answer": places >= first,
            "line.kind": torch.full_like(places, store.kind(example.kind)),
        }


def collect(
    model: DenseModel, examples: Sequence[Example], store: HiddenStateStore, progress: Progress
) -> None:
    """Store the hidden states of the answers of ``examples`` that ``store`` does not hold yet."""
    Collector(model, store, progress).finish(examples)
