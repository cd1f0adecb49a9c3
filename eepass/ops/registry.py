"""How ``eepass::`` operators are defined: a schema, a reference implementation, a fake.

The reference implementation is plain PyTorch, for any device and row count. ``codegen`` registers
faster kernels for the same operators; tests compare them with it. Defined through
``torch.library.Library``, since ``custom_op`` imports all of Dynamo on its first call.
"""

from collections.abc import Callable
from typing import Any

import torch

_library = torch.library.Library("eepass", "DEF")
# the reference implementation of each overload, for graphs that must hold standard operators alone
REFERENCES: dict[Any, Callable[..., Any]] = {}


def define(schema: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Define ``schema`` with the decorated function as its reference implementation."""

    def register(reference: Callable[..., Any]) -> Callable[..., Any]:
        name = schema.split("(")[0]
        _library.define(schema)
        _library.impl(name, reference, "CompositeExplicitAutograd")
        packet, _, overload = name.partition(".")
        operator = getattr(getattr(torch.ops.eepass, packet), overload or "default")
        REFERENCES[operator] = reference
        return reference

    return register


def fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated function as the fake of operator ``name``: shapes and dtypes alone."""
    return torch.library.register_fake(f"eepass::{name}", lib=_library)
