"""The tensors of a checkpoint's safetensors files, by name, each checked as it is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from eepass.errors import InputError

INDEX = "model.safetensors.index.json"
FLOATS = (torch.float16, torch.bfloat16, torch.float32)


class StoredTensors:
    """The tensors of a folder, in one safetensors file or in several with an index.

    Raises ``InputError`` naming the file that is missing, truncated or not what the index says.
    ``taken``: the names of those that were read.
    """

    def __init__(self, folder: Path) -> None:
        self.taken: set[str] = set()
        self._files: dict[str, Any] = {}
        index = folder / INDEX
        if index.is_file():
            for file, names in _shards(index).items():
                opened = _opened(folder / file)
                missing = names - set(opened.keys())
                if missing:
                    raise InputError(f"{index.name}: {min(missing)} is not in {file}")
                self._files |= dict.fromkeys(names, opened)
            return
        files = sorted(folder.glob("*.safetensors"))
        if len(files) != 1:
            raise InputError(f"{len(files)} safetensors files and no {INDEX}")
        opened = _opened(files[0])
        self._files = dict.fromkeys(opened.keys(), opened)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    @property
    def left(self) -> list[str]:
        """The names of the tensors that nothing has read."""
        return sorted(self._files.keys() - self.taken)

    def take(self, name: str, shape: tuple[int, ...], *dtypes: torch.dtype) -> Tensor:
        """The tensor ``name``; ``InputError`` if it has another shape or none of ``dtypes``."""
        if name not in self._files:
            raise InputError(f"{name} is not in the checkpoint")
        self.taken.add(name)
        try:
            tensor: Tensor = self._files[name].get_tensor(name)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise InputError(f"{name} cannot be read ({error})") from error
        if tuple(tensor.shape) != shape or tensor.dtype not in dtypes:
            wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise InputError(
                f"{name} is {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}, not "
                f"{wanted} {list(shape)} as the model and its quantization_config say"
            )
        return tensor

    def take_scales(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Scales in float32; ``InputError`` as ``take`` raises it, and where one is not finite."""
        scales = self.take(name, shape, *FLOATS).float()
        if not scales.isfinite().all():
            raise InputError(f"{name} holds numbers that are not finite")
        return scales


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, "pt")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file.name}: not a whole safetensors file ({error})") from error


def _shards(index: Path) -> dict[str, set[str]]:
    """The names of the tensors in each file."""
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        named = [(str(name), str(file)) for name, file in places.items()]
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise InputError(f"{index.name}: not an index of safetensors files ({error!r})") from error
    files: dict[str, set[str]] = {}
    for name, file in named:
        # beside the index, and nowhere else
        if Path(file).name != file:
            raise InputError(f"{index.name}: {file!r} is no name of a file beside it")
        files.setdefault(file, set()).add(name)
    return files
