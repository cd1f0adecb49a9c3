"""What a trace of a model depended on besides the values it reads anew, and whether it still holds.

A trace follows Python once: it has followed the modules there were, their classes, their plain
attributes and training flags, and has computed tables from buffers. All of these are kept in
dicts, lists and sets, so a shallow copy of each, compared with what is there, tells of any change.
Comparing takes C alone: 0.2 ms for 400 modules.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

from eepass.errors import InputError

# where a model keeps what eepass made of it
OWN = "_eepass_prepared"
# attributes that say nothing about what a module computes for given tokens: where it was read from,
# how texts are made with it, who has looked at it
ASIDE = {
    OWN, "generate", "_extract_generation_mode_kwargs", "prepare_inputs_for_generation",
    "generation_config", "name_or_path", "_name_or_path", "_commit_hash", "_original_object_hash",
    "warnings_issued", "_is_hf_initialized", "_output_capturing_hooks_installed",
    "_non_persistent_buffers_set", "_backward_pre_hooks", "_backward_hooks",
    "_is_full_backward_hook", "_state_dict_hooks", "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks", "_compiled_call_impl",
}  # fmt: skip
HOOKS = ("_forward_hooks", "_forward_pre_hooks")
# hooks with which transformers collects hidden states where it is asked for them
HARMLESS = "transformers.utils.output_capturing"
# objects in attributes of objects in attributes ...
DEPTH = 4
OPAQUE = (
    Tensor, nn.Module, type, FunctionType, BuiltinFunctionType, MethodType, ModuleType, partial
)  # fmt: skip
Container = dict[Any, Any] | list[Any] | set[Any]


class ModelStamp:
    """Taken of ``model`` as it is; it holds until something a trace may depend on changes.

    Seen: a module, parameter or buffer replaced, moved or written to in place, an attribute of a
    module or of its configuration, a training flag, a hook, a method replaced on a module or its
    class. Not seen: what is written through ``tensor.data``, which no counter counts, and what a
    function keeps in its closure.
    """

    def __init__(self, model: nn.Module) -> None:
        watched = [*_watched(model), *_global_hooks()]
        self._contents = Contents(watched)
        # all but the model itself, which may keep its stamp
        self._modules = dict(list(model.named_modules())[1:])
        self._classes = [type(model), *map(type, self._modules.values())]
        self._root = _without_aside(vars(model))
        named = [
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(remove_duplicate=False),
        ]
        loose = {
            id(value): (f"{name}[{key!r}]", value)
            for name, container in watched if isinstance(container, dict)
            for key, value in container.items() if isinstance(value, Tensor)
        }  # fmt: skip
        tensors = {id(tensor): (name, tensor) for name, tensor in named}
        tensors = {**loose, **tensors}
        self._tensor_names = [name for name, _ in tensors.values()]
        self._tensors = [tensor for _, tensor in tensors.values()]
        self._writes = _writes(self._tensors)

    def change(self, model: nn.Module) -> str:
        """What has changed in ``model`` since, by name; "" where nothing has."""
        if _writes(self._tensors) != self._writes:
            now = zip(self._tensor_names, _writes(self._tensors), self._writes, strict=True)
            return next(name for name, new, old in now if new != old)
        classes = [type(model), *map(type, self._modules.values())]
        if classes != self._classes:
            pairs = zip(("the model", *self._modules), classes, self._classes, strict=True)
            return next(f"the class of {name}" for name, new, old in pairs if new is not old)
        if _differ(_without_aside(vars(model)), self._root):
            return _first_key(_without_aside(vars(model)), self._root)
        return self._contents.change()


class CodeStamp:
    """Of ``model``'s hooks and its classes' methods alone, which Dynamo's guards do not look at."""

    def __init__(self, model: nn.Module) -> None:
        modules = dict(model.named_modules())
        hooks = [(f"{n}.{kind}", vars(m)[kind]) for n, m in modules.items() for kind in HOOKS]
        classes = _methods({kind for m in modules.values() for kind in type(m).__mro__})
        self._contents = Contents([*hooks, *classes, *_global_hooks()])

    def change(self) -> str:
        """What has changed since, by name; "" where nothing has."""
        return self._contents.change()


class Contents:
    """What was in some containers, given by name; compared with what is."""

    def __init__(self, watched: Sequence[tuple[str, Container]]) -> None:
        self._names = [name for name, _ in watched]
        self._containers = [container for _, container in watched]
        self._copies = [_copy(container) for container in self._containers]

    def change(self) -> str:
        """The first that differs, by name and key; "" where none does."""
        if not _differ(self._containers, self._copies):
            return ""
        for at, container in enumerate(self._containers):
            if not _differ(container, self._copies[at]):
                continue
            if not isinstance(container, Mapping):
                return self._names[at]
            new, old = _without_aside(container), _without_aside(self._copies[at])
            if _differ(new, old) and not _harmless(self._names[at], new, old):
                return f"{self._names[at]}.{_first_key(new, old)}".strip(".")
            self._copies[at] = _copy(container)
        return ""


def refuse_unfollowed(model: nn.Module) -> None:
    """Raise ``InputError`` where ``model`` does what a trace cannot follow: hooks, whose state is
    their own, and modules in training mode, which draw random numbers."""
    found: list[tuple[str, Any]] = [("every module", hooks) for _, hooks in _global_hooks()]
    for name, module in model.named_modules():
        where = name or type(model).__name__
        if module.training:
            raise InputError(f"{where} is in training mode: call model.eval() first")
        found += [(where, vars(module)[kind]) for kind in HOOKS]
    for where, hooks in found:
        for hook in hooks.values():
            if getattr(hook, "__module__", "") != HARMLESS:
                raise InputError(
                    f"{where} has a forward hook ({_name_of(hook)}), and a trace cannot follow "
                    "what it does later: remove it, or generate with custom_generate=None"
                )


def _watched(model: nn.Module) -> Iterator[tuple[str, Container]]:
    """The containers that ``model`` consists of by name, but its own ``__dict__``."""
    seen: set[int] = set()
    classes: set[type] = set()

    def inside(name: str, value: Any, depth: int) -> Iterator[tuple[str, Container]]:
        if isinstance(value, (dict, list, tuple, set)):
            if id(value) in seen:
                return
            seen.add(id(value))
            if not isinstance(value, tuple):
                yield name, value
            items = value.items() if isinstance(value, dict) else enumerate(value)
            for key, one in list(items):
                yield from inside(f"{name}.{key}", one, depth)
        elif (
            depth
            and hasattr(value, "__dict__")
            and not isinstance(value, OPAQUE)
            and id(value) not in seen
        ):
            seen.add(id(value))
            yield from attributes(name, value, depth - 1)

    def attributes(name: str, owner: Any, depth: int) -> Iterator[tuple[str, Container]]:
        if owner is not model:
            yield name, vars(owner)
        for key, value in vars(owner).items():
            if key not in ASIDE:
                yield from inside(f"{name}.{key}".strip("."), value, depth)

    for name, module in model.named_modules():
        classes.update(type(module).__mro__)
        yield from attributes(name, module, DEPTH)
    yield from _methods(classes)
    # functions that methods call; a user's own module may count in its globals
    homes = {kind.__module__ for kind in classes if kind.__module__.startswith("transformers.")}
    for home in homes:
        yield home, vars(sys.modules[home])


def _methods(classes: set[type]) -> Iterator[tuple[str, Container]]:
    for kind in classes:
        if not kind.__module__.startswith(("torch.", "builtins")):
            # a proxy of the class's own dict, which compares as that does
            yield kind.__qualname__, vars(kind)  # type: ignore[misc]


def _global_hooks() -> list[tuple[str, Container]]:
    """Hooks of all modules there are."""
    home = nn.modules.module
    return [(f"torch{kind}", getattr(home, f"_global{kind}")) for kind in HOOKS]


def _copy(container: Any) -> Any:
    return dict(container) if isinstance(container, Mapping) else type(container)(container)


def _without_aside(container: Mapping[Any, Any]) -> dict[Any, Any]:
    return {key: value for key, value in container.items() if key not in ASIDE}


def _differ(new: Any, old: Any) -> bool:
    try:
        return bool(new != old)
    except (RuntimeError, ValueError):
        # other tensors or arrays in the places of those there were
        return True


def _first_key(new: Mapping[Any, Any], old: Mapping[Any, Any]) -> str:
    keys = [*new, *(key for key in old if key not in new)]
    gone = object()
    return str(next(k for k in keys if _differ([new.get(k, gone)], [old.get(k, gone)])))


def _harmless(name: str, new: Mapping[Any, Any], old: Mapping[Any, Any]) -> bool:
    """Whether only hooks that transformers adds by itself have come or gone."""
    if not name.endswith(HOOKS):
        return False
    changed = [new.get(key, old.get(key)) for key in new.keys() ^ old.keys()]
    return all(getattr(hook, "__module__", "") == HARMLESS for hook in changed)


def _writes(tensors: list[Tensor]) -> list[tuple[int, int]]:
    """Address and count of writes of each; inference tensors count none."""
    try:
        return [(tensor.data_ptr(), tensor._version) for tensor in tensors]
    except RuntimeError:
        return [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors]


def _name_of(hook: Any) -> str:
    return getattr(hook, "__qualname__", type(hook).__qualname__)
