"""How much the files of a checkpoint hold; a model that asks for more is refused unbuilt.

Sizes come from a file that anybody can write: a layer count of a billion would fill the memory long
before a tensor is found missing.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.nn.modules.module import register_module_parameter_registration_hook

from eepass.checkpoints.formats.stored import opened_file, shards_of
from eepass.errors import InputError

# settings that say how often a layer, which has tensors of its own, is built
LAYER_COUNT = re.compile(r"^(num|n)_(\w+_)?layers?$|\bblock_count$")
# values that are built for nothing, at most
SLACK = 1 << 24
# dtypes of safetensors that are no numbers of a weight which is not quantised
INTEGERS = ("BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64")


@dataclass(frozen=True, slots=True)
class Holdings:
    """The number of tensors and of their values in ``where``; ``integers``: names of those whose
    values are whole numbers."""

    where: str
    tensors: int
    values: int
    integers: tuple[str, ...] = ()

    def refuse_layers(self, settings: Any) -> None:
        """Raise ``InputError`` if ``settings`` from JSON name more layers than tensors."""
        for name, count in _counts(settings):
            if count > self.tensors:
                raise InputError(
                    f"{self.where}: {name} is {count}, and its files hold {self.tensors} tensors"
                )

    @contextmanager
    def bounding(self) -> Iterator[None]:
        """While this is open, a model far larger than what the files hold raises ``InputError``.

        Twice as large may be built, and a little more: heads are built before they are tied, and
        what is missing is better refused by its name.
        """
        sizes: dict[tuple[int, str], int] = {}
        total, most = 0, 2 * self.values + SLACK
        thread = threading.get_ident()

        def count(module: Any, name: str, parameter: Any) -> None:
            nonlocal total
            place = (id(module), name)
            # a weight that is read takes the place of the one that was built
            if parameter is None or place in sizes or threading.get_ident() != thread:
                return
            sizes[place] = max(parameter.numel(), 1)
            total += sizes[place]
            if total > most:
                raise InputError(
                    f"{self.where}: its configuration asks for more than the {self.values} values "
                    f"its files hold ({name} is {' x '.join(map(str, parameter.shape))})"
                )

        handle = register_module_parameter_registration_hook(count)
        try:
            yield
        finally:
            handle.remove()


def holdings_of(spec: str, quantised: bool) -> Holdings:
    """What the weights of a folder or an id of Hugging Face hold, from the files' headers.

    ``quantised``: up to eight values may be packed in a byte. Raises ``InputError`` where there are
    no weights.
    """
    try:
        return _holdings(spec, quantised)
    except InputError as error:
        raise InputError(f"{spec}: {error}") from error


def _holdings(spec: str, quantised: bool) -> Holdings:
    files = [Path(file) for file in _weight_files(spec)]
    if not files:
        raise InputError("no weights there (model.safetensors)")
    if quantised or files[0].suffix != ".safetensors":
        size = sum(file.stat().st_size for file in files if file.is_file())
        # every tensor has an entry in its file
        return Holdings(spec, size // 8, size * 8 if quantised else size)
    tensors = values = 0
    integers: list[str] = []
    for file in files:
        with opened_file(file) as opened:
            for name in opened.keys():  # noqa: SIM118 - no mapping
                part = opened.get_slice(name)
                tensors += 1
                values += _product(part.get_shape())
                if part.get_dtype() in INTEGERS:
                    integers.append(name)
    return Holdings(spec, tensors, values, tuple(integers))


def _weight_files(spec: str) -> list[str]:
    """The files transformers reads weights from; those of an id are downloaded as it does."""
    from transformers.utils import cached_file

    from eepass.private_names import get_checkpoint_shard_files

    for kind in ("model.safetensors", "pytorch_model.bin"):
        for name in (kind, f"{kind}.index.json"):
            found = cached_file(
                spec, name,
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
            )  # fmt: skip
            if found is None:
                continue
            if name == kind:
                return [found]
            # only says what is wrong with it
            shards_of(Path(found))
            shards: list[str] = get_checkpoint_shard_files(spec, found)[0]
            if shards:
                return shards
    # quantised ones have other names, too
    return [str(file) for file in sorted(Path(spec).glob("*.safetensors"))]


def _counts(settings: Any) -> Iterator[tuple[str, int]]:
    waiting = [settings]
    while waiting:
        found = waiting.pop()
        if isinstance(found, Mapping):
            for name, value in found.items():
                if isinstance(value, (Mapping, list)):
                    waiting.append(value)
                elif isinstance(value, (int, float)) and LAYER_COUNT.search(str(name)):
                    yield str(name), int(value)
        elif isinstance(found, list):
            waiting += found


def _product(extents: Iterable[int]) -> int:
    product = 1
    for extent in extents:
        product *= extent
    return product
