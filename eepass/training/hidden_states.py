"""Boundaries of the model along its own answers, in shards on disk.

Half a million tokens at thirty boundaries are 17 GB: a shard holds some ten thousand tokens, and
what is trained reads one boundary of one split at a time. Of the dense logits only the normed
state ``z`` is kept (the losses make hot logits from it) and the dense argmax.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from eepass.files import write_tensors_atomically, write_text_atomically
from eepass.runtime.engine.engine import Engine
from eepass.training.corpus import Example

SHARD_TOKENS = 16_384


class HiddenStateStore:
    """Shards under ``folder``, with one row per answer token:

    ``boundary.<layer>`` [n, H]; ``z`` [n, H]: the normed last boundary; ``token``: the token at
    this position; ``label``: the dense argmax that follows; ``place``: its position in the answer.

    And one row per token of prompt and answer, for the draft head: ``line.token``;
    ``line.features`` [m, F * H]: z and the boundaries after the layers ``features``;
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
        return int(json.loads(path.read_text())["examples"]) if path.exists() else 0

    def read(self, split: str, name: str) -> Tensor:
        """One tensor of one split over all its shards."""
        parts = []
        for path in sorted(self.folder.glob(f"{split}-*.safetensors")):
            with safe_open(path, "pt") as shard:
                parts.append(shard.get_tensor(name))
        return torch.cat(parts)

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
    def waiting(self) -> int:
        return sum(len(row["token"]) for rows in self._rows.values() for row in rows)


def collect(
    engine: Engine,
    norm: Callable[[Tensor], Tensor],
    lm_head: Tensor,
    examples: Sequence[Example],
    store: HiddenStateStore,
    progress: Callable[[int], None],
) -> None:
    """Run each example through ``engine`` and keep its answer's boundaries; resumes by itself.

    ``norm`` maps the last boundary [1, n, H] to z; ``progress`` is told the tokens of each example.
    """
    begin = store.examples_done
    for index in range(begin, len(examples)):
        example = examples[index]
        ids = [*example.prompt, *example.answer][: engine.decoder.max_sequence_length]
        first, last = len(example.prompt) - 1, len(ids) - 1
        wanted = {*store.layers, *store.features, engine.decoder.num_layers}
        kept: dict[int, list[Tensor]] = {layer: [] for layer in wanted}

        def on_layer(layer: int, hidden: Tensor, kept: dict[int, list[Tensor]] = kept) -> None:
            if layer in kept:
                kept[layer].append(hidden[0].clone())

        engine.prefill(ids, on_layer)
        if last > first:
            rows = {layer: torch.cat(parts)[:last] for layer, parts in kept.items()}
            z = norm(rows[engine.decoder.num_layers][None])[0]
            tokens = torch.tensor(ids[:last], dtype=torch.int32)
            places = torch.arange(last, dtype=torch.int32)
            added = {f"boundary.{layer}": rows[layer][first:].clone() for layer in store.layers}
            added["z"] = z[first:].clone()
            added["token"] = tokens[first:].clone()
            added["label"] = dense_argmax(z[first:], lm_head).to(torch.int32)
            added["place"] = places[: last - first].clone()
            added["line.token"], added["line.place"] = tokens, places
            added["line.features"] = torch.cat([z, *(rows[n] for n in store.features)], -1)
            added["line.answer"] = places >= first
            store.add(example.split, added)
        progress(len(ids))
        if store.waiting >= SHARD_TOKENS:
            store.flush(index + 1)
    store.flush(len(examples))


def dense_argmax(z: Tensor, lm_head: Tensor) -> Tensor:
    """The dense answer for z [n, H]: the eight best of the rounded logits, summed in float32."""
    best = (z @ lm_head.T).topk(8, -1).indices  # [n, 8]
    exact = torch.einsum("nh,nkh->nk", z.float(), lm_head[best].float())
    return best.gather(1, exact.argmax(-1, keepdim=True))[:, 0]
