"""What the things that are kept depend on: hashes of a model's structure and of its surroundings.

The structure is everything that tracing may have looked at: configuration, modules with their plain
attributes and source files, names, shapes, dtypes and ties of parameters and buffers. The values of
weights are no part of it.
"""

from __future__ import annotations

import hashlib
import inspect
import platform
import sys
from collections.abc import Iterable, Mapping
from functools import cache, partial
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from eepass.codegen.cpu.building import KernelsMissing, cpu_flags, find_compiler
from eepass.model_stamp import ASIDE

ROOT = Path(__file__).parents[1]
# looked at elsewhere: as modules and tensors, or refused beforehand
APART = ASIDE | {"training", "_parameters", "_buffers", "_modules"}
PLAIN = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device)


class Unforeseen(ValueError):
    """Something about a model that a key cannot name, so nothing of it is kept; says what."""


def environment() -> str:
    """A hash of what compiled code and traces depend on besides the model: the versions of eepass,
    PyTorch and transformers, the processor, the C++ compiler and the number of threads."""
    modes = (
        torch.get_num_threads(), torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
    )  # fmt: skip
    try:
        compiler = find_compiler()
    except KernelsMissing:
        compiler = ""
    return _hash((_installed(), compiler, modes))


def model_key(model: Any, *options: Any) -> str:
    """A hash of the structure of ``model``, of ``options`` and of the environment.

    Raises ``Unforeseen`` for a model that was changed in ways that cannot be read off it.
    """
    config = model.config.to_dict()
    parts: list[Any] = [environment(), repr(options), _plain(config, "its configuration")]
    known = {id(t) for t in (*model.parameters(), *model.buffers())}
    kinds: set[type] = set()
    for name, module in model.named_modules():
        kinds.add(type(module))
        parts.append((name, type(module).__module__, type(module).__qualname__))
        parts += _attributes(name, module, known)
    ties: dict[int, int] = {}
    named = (*model.named_parameters(remove_duplicate=False),
             *model.named_buffers(remove_duplicate=False))  # fmt: skip
    for name, tensor in named:
        tie = ties.setdefault(id(tensor), len(ties))
        form = (tuple(tensor.shape), tuple(tensor.stride()), str(tensor.dtype), str(tensor.device))
        parts.append((name, tie, type(tensor).__name__, *form))
    parts += sorted(_sources(kinds))
    return _hash(parts)


def tensors_key(tensors: Mapping[str, Tensor], *options: Any) -> str:
    """A hash of names, shapes and dtypes of ``tensors``, and of ``options``."""
    forms = [(name, tuple(t.shape), str(t.dtype)) for name, t in sorted(tensors.items())]
    return _hash((environment(), forms, repr(options)))


def _attributes(name: str, module: nn.Module, known: set[int]) -> Iterable[Any]:
    """What is said by the attributes of ``module`` that are neither tensors nor modules."""
    for attribute, value in sorted(vars(module).items()):
        if attribute in APART:
            continue
        where = f"{name}.{attribute}"
        if attribute.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")):
            if value:
                raise Unforeseen(f"{where} holds hooks")
        elif isinstance(value, Tensor):
            if id(value) not in known:
                raise Unforeseen(f"{where} is a tensor beside parameters and buffers")
        elif attribute == "forward":
            raise Unforeseen(f"{where} was replaced")
        else:
            yield where, _plain(value, where)


def _plain(value: Any, where: str) -> Any:
    """``value`` where it is plain, else what kind of thing it is."""
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, Mapping):
        kept = ((key, one) for key, one in value.items() if key not in APART)
        return [(str(key), _plain(one, where)) for key, one in kept]
    if isinstance(value, (list, tuple)):
        return [_plain(one, where) for one in value]
    if isinstance(value, (set, frozenset)):
        return sorted(map(repr, value))
    if isinstance(value, Tensor):
        raise Unforeseen(f"{where} holds a tensor")
    if isinstance(value, partial):
        return [_plain(one, where) for one in (value.func, value.args, value.keywords)]
    of = value if hasattr(value, "__qualname__") else type(value)
    # what an activation, say, was given when it was made
    inside = getattr(value, "__dict__", {}) if of is type(value) else {}
    given = {n: one for n, one in inside.items() if isinstance(one, PLAIN) and n not in APART}
    return [f"{of.__module__}.{of.__qualname__}", sorted(given.items())]


def _sources(kinds: Iterable[type]) -> set[tuple[str, ...]]:
    """The source files of modules' classes, with their hashes; not of PyTorch's own. What a source
    file calls may have been replaced since it was read, so functions and methods are named with
    where they come from."""
    found: set[tuple[str, ...]] = set()
    bases = {base for kind in kinds for base in kind.__mro__}
    for kind in bases - {object}:
        if kind.__module__.partition(".")[0] == "torch":
            continue
        try:
            file = inspect.getsourcefile(kind)
        except TypeError:
            file = None
        if file is None or not Path(file).is_file():
            raise Unforeseen(f"the source of {kind.__qualname__} is not to be found")
        found.add((kind.__module__, _file_hash(Path(file))))
        for scope in (vars(kind), vars(sys.modules[kind.__module__])):
            for name, function in scope.items():
                if isinstance(function, FunctionType):
                    found.add((kind.__module__, name, *_named(function, kind)))
    return found


def _named(function: FunctionType, kind: type) -> tuple[str, str]:
    """Module and name of a function that ``kind`` uses."""
    packages = {name.partition(".")[0] for name in (kind.__module__, "torch", "transformers")}
    # what Python generates for a class may have no module
    module = function.__module__ or kind.__module__
    foreign = module.partition(".")[0] not in packages
    if foreign and "<locals>" in function.__qualname__:
        # a name says nothing about what such a one does
        raise Unforeseen(f"{kind.__module__} uses {module}.{function.__qualname__}")
    return module, function.__qualname__


@cache
def _installed() -> tuple[Any, ...]:
    import transformers

    # in a checkout the stages are folders beside the package's
    homes = [ROOT, *(ROOT / stage for stage in ("passes", "codegen", "runtime"))]
    files = {path for home in homes for end in ("*.py", "*.cpp", "*.h") for path in home.rglob(end)}
    sources = [(str(path.relative_to(ROOT)), _file_hash(path)) for path in sorted(files)]
    versions = (torch.__version__, transformers.__version__, platform.python_version())
    return (versions, platform.machine(), cpu_flags(), sources)


@cache
def _file_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _hash(parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]
