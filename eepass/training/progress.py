"""How far a training is: reported while it runs, kept on disk for the next run to resume from."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor

from eepass.errors import InputError
from eepass.files import write_tensors_atomically, write_text_atomically
from eepass.folders import locked
from eepass.reading import parse_json

LOCK = ".eepass.lock"
# by eepass.files, and by safetensors
HALF_WRITTEN = re.compile(r"\..+\.\d+\.part|\.tmp\w+")


class Progress(Protocol):
    """``begin`` starts a stage of ``total`` units; ``advance`` counts units that are done; ``say``
    tells what cannot be counted."""

    def begin(self, stage: str, total: int) -> None: ...
    def advance(self, amount: int) -> None: ...
    def say(self, text: str) -> None: ...


class NoProgress:
    """A progress that shows nothing."""

    def begin(self, stage: str, total: int) -> None: ...
    def advance(self, amount: int) -> None: ...
    def say(self, text: str) -> None: ...


@contextmanager
def claimed(checkpoint: Path, folder: Path) -> Iterator[None]:
    """Hold ``checkpoint``, of the training in ``folder``, for this process alone, and remove what
    processes that died were writing; ``InputError`` if another process holds it."""
    checkpoint.mkdir(parents=True, exist_ok=True)
    with locked(checkpoint / LOCK, folder):
        for left in checkpoint.rglob(".*"):
            if HALF_WRITTEN.fullmatch(left.name):
                left.unlink(missing_ok=True)
        yield


def check_request(checkpoint: Path, request: Mapping[str, object]) -> None:
    """Raise ``InputError`` if ``checkpoint`` holds a training that was asked for otherwise."""
    path = checkpoint / "request.json"
    if not path.exists():
        write_text_atomically(path, json.dumps(request))
        return
    stored = _own_json(path, path.read_bytes())
    changed = [name for name, value in request.items() if stored.get(name) != value]
    if changed:
        raise InputError(
            f"{checkpoint}: holds a training with other {', '.join(changed)}; "
            "delete it or choose another --out"
        )


def _own_json(path: Path, text: bytes) -> Any:
    """An object of a file that a training wrote; ``InputError`` where it is damaged."""
    try:
        found = parse_json(text)
        if isinstance(found, dict):
            return found
    except ValueError:
        pass
    raise InputError(f"{path}: damaged; delete {path.parent} or choose another --out")


class RecordFile:
    """JSON records, one a line; the file grows record by record."""

    def __init__(self, path: Path) -> None:
        self.path = path
        written = path.read_bytes() if path.exists() else b""
        # a run that was stopped may have left half a line
        whole = written[: written.rfind(b"\n") + 1]
        if whole != written:
            os.truncate(path, len(whole))
        self.records: list[dict[str, Any]] = [_own_json(path, line) for line in whole.splitlines()]

    def append(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        with self.path.open("ab") as file:
            file.write(json.dumps(record).encode() + b"\n")


def made_once(
    path: Path, make: Callable[..., Mapping[str, Tensor]], *arguments: Any
) -> dict[str, Tensor]:
    """The tensors in ``path``, which ``make`` returns the first time."""
    if not path.exists():
        write_tensors_atomically(path, make(*arguments))
    return load_file(path)


@dataclass(frozen=True, slots=True)
class PassCheckpoint:
    """Weights and optimizer states after each whole pass over the data, in ``path`` if given."""

    path: Path | None
    weights: Mapping[str, Tensor]
    optimizers: Sequence[torch.optim.Optimizer]

    def save(self, passes: int) -> None:
        if self.path is None:
            return
        tensors = {f"weight.{name}": weight.detach() for name, weight in self.weights.items()}
        for number, optimizer in enumerate(self.optimizers):
            for index, state in optimizer.state_dict()["state"].items():
                tensors |= {f"{number}.{index}.{n}": torch.as_tensor(v) for n, v in state.items()}
        write_tensors_atomically(self.path, {**tensors, "passes": torch.tensor(passes)})

    def restore(self) -> int:
        """Set weights and optimizers to what was saved; the number of passes done."""
        if self.path is None or not self.path.exists():
            return 0
        tensors = load_file(self.path)
        for name, weight in self.weights.items():
            weight.data.copy_(tensors[f"weight.{name}"])
        states: list[dict[int, dict[str, Tensor]]] = [{} for _ in self.optimizers]
        for name, tensor in tensors.items():
            number, *rest = name.split(".", 2)
            if number.isdecimal():
                states[int(number)].setdefault(int(rest[0]), {})[rest[1]] = tensor
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        return int(tensors["passes"])
