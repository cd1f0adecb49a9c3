"""How ``eepass::`` operators are defined: a schema, a reference implementation, a fake.

The reference implementation is plain PyTorch, for any device and number of rows. ``codegen``
registers faster kernels for the same operators; tests compare them with it. Defined through
``torch.library.Library``, since ``custom_op`` imports all of Dynamo on its first call.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch

_library = torch.library.Library("eepass", "DEF")
# the reference implementation of each overload, for graphs that may hold standard operators only
REFERENCES: dict[Any, Callable[..., Any]] = {}


def define(
    schema: str, *, fake: Callable[..., Any]
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Define ``schema`` with the decorated function as its reference implementation.

    ``fake`` returns empty outputs of the right shapes and dtypes; it names, as its parameters, the
    operator's positional arguments that these depend on.
    """

    def register(reference: Callable[..., Any]) -> Callable[..., Any]:
        name = schema.split("(")[0]
        _library.define(schema)
        _library.impl(name, reference, "CompositeExplicitAutograd")
        packet, _, overload = name.partition(".")
        operator = getattr(getattr(torch.ops.eepass, packet), overload or "default")
        names = [argument.name for argument in operator._schema.arguments]
        needed = [names.index(parameter) for parameter in inspect.signature(fake).parameters]

        def from_arguments(*arguments: Any, **_: Any) -> Any:
            return fake(*(arguments[index] for index in needed))

        torch.library.register_fake(f"eepass::{name}", from_arguments, lib=_library)
        REFERENCES[operator] = reference
        return reference

    return register
