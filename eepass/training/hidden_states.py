"""Hidden states of the model along its own answers, in shards on disk.

Half a million tokens at thirty layers are 17 GB: a shard holds some ten thousand tokens, and
training reads the states of one layer and one split at a time. Of the dense logits only the normed
state ``z`` is stored (the losses compute hot logits from it) and the dense argmax.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from eepass.files import write_tensors_atomically, write_text_atomically
from eepass.reading import parse_json
from eepass.training.corpus import Example
from eepass.training.dense_model import DenseModel, best_token
from eepass.training.progress import Progress
from eepass.training.unrolling import Lines

SHARD_TOKENS = 16_384


class HiddenStateStore:
    """Shards under ``folder``, with one row per answer token:

    ``boundary.<layer>`` [n, H]: the hidden state after that layer; ``z`` [n, H]: the last one,
    normed; ``token``: the token at this position; ``label``: the dense token that follows.

    And one row per token of prompt and answer, for the draft head: ``line.token``;
    ``line.features`` [m, F * H]: z and the hidden states after the layers ``features``;
    ``line.place``; ``line.answer``: whether it is among the rows above.
    """

    def __init__(self, folder: Path, layers: Sequence[int], features: Sequence[int] = ()) -> None:
        self.folder = folder
        self.layers, self.features = tuple(layers), tuple(features)
        folder.mkdir(parents=True, exist_ok=True)
        self._rows: dict[str, list[dict[str, Tensor]]] = {}

    @property
    def examples_done(self) -> int:
        path = self.folder / "done.json"
        return int(parse_json(path.read_bytes())["examples"]) if path.exists() else 0

    def read(self, split: str, name: str) -> Tensor:
        """One tensor of one split over all its shards."""
        parts = []
        for path in self._shards(split):
            with safe_open(path, "pt") as shard:
                parts.append(shard.get_tensor(name))
        return torch.cat(parts)

    def labels(self, split: str) -> Tensor:
        """The dense tokens [n]; none for a split without answers."""
        if not self._shards(split):
            return torch.zeros(0, dtype=torch.long)
        return self.read(split, "label").long()

    def lines(self, split: str) -> Lines:
        return Lines(*(self.read(split, f"line.{name}") for name in Lines._fields))

    def add(self, split: str, rows: dict[str, Tensor]) -> None:
        self._rows.setdefault(split, []).append(rows)

    def flush(self, examples_done: int) -> None:
        """Write what was added; only then count its examples as done."""
        for split, rows in self._rows.items():
            joined = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
            path = self.folder / f"{split}-{examples_done:07d}.safetensors"
            write_tensors_atomically(path, joined)
        self._rows.clear()
        write_text_atomically(self.folder / "done.json", json.dumps({"examples": examples_done}))

    @property
    def unwritten(self) -> int:
        """Answer tokens added since the last flush."""
        return sum(len(row["token"]) for rows in self._rows.values() for row in rows)

    def _shards(self, split: str) -> list[Path]:
        return sorted(self.folder.glob(f"{split}-*.safetensors"))


@torch.no_grad()
def collect(
    model: DenseModel, examples: Sequence[Example], store: HiddenStateStore, progress: Progress
) -> None:
    """Store the hidden states of the answers of ``examples`` that ``store`` does not hold yet."""
    lengths = [len(example.prompt) + len(example.answer) for example in examples]
    progress.begin("collecting hidden states", sum(lengths))
    done = store.examples_done
    progress.advance(sum(lengths[:done]))
    for index, example in enumerate(examples[done:], done + 1):
        ids = [*example.prompt, *example.answer][: model.decoder.max_sequence_length]
        if len(ids) > len(example.prompt):
            store.add(example.split, _rows_of(model, ids, len(example.prompt) - 1, store))
        progress.advance(lengths[index - 1])
        if store.unwritten >= SHARD_TOKENS:
            store.flush(index)
    store.flush(len(examples))


def _rows_of(
    model: DenseModel, ids: list[int], first: int, store: HiddenStateStore
) -> dict[str, Tensor]:
    """The rows of one example; position ``first`` predicts the first token of its answer."""
    depth, last = model.decoder.num_layers, len(ids) - 1
    parts: dict[int, list[Tensor]] = {n: [] for n in (*store.layers, *store.features, depth)}

    def on_layer(layer: int, hidden: Tensor) -> None:
        if layer in parts:
            parts[layer].append(hidden[0].clone())

    model.engine.prefill(ids, on_layer)
    hidden = {layer: torch.cat(chunks)[:last] for layer, chunks in parts.items()}
    z = model.lens.norm(hidden[depth])
    tokens = torch.tensor(ids[:last], dtype=torch.int32)
    positions = torch.arange(last, dtype=torch.int32)
    return {
        **{f"boundary.{layer}": hidden[layer][first:].clone() for layer in store.layers},
        "z": z[first:].clone(),
        "token": tokens[first:].clone(),
        "label": best_token(z[first:], model.lm_head).to(torch.int32),
        "line.token": tokens,
        "line.place": positions,
        "line.features": torch.cat([z, *(hidden[n] for n in store.features)], -1),
        "line.answer": positions >= first,
    }
