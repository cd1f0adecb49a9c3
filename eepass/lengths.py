"""How long a text may be: no longer than the model has positions for."""

from __future__ import annotations

from typing import Any

from eepass.errors import InputError


def usual_length(model: Any, tokens: int) -> int:
    """``tokens``, or the number of positions ``model`` has if that is smaller."""
    return min(tokens, _known(model) or tokens)


def shared_length(model: Any, tokens: int, step: int = 1024) -> int:
    """A length of at least ``tokens``, as far as ``model`` has positions, that many texts share:
    what is compiled for one is there for the next."""
    return usual_length(model, -(-tokens // step) * step)


def refuse_longer(model: Any, tokens: int, what: str) -> None:
    """Raise ``InputError`` where ``what``, of ``tokens`` tokens, is longer than ``model`` allows.

    Beyond its positions a model with a table of them has nothing to look up, and one that computes
    them was never trained there; neither shows in the output.
    """
    known = _known(model)
    if known is not None and tokens > known:
        raise InputError(
            f"{what}: {tokens} tokens, and {type(model).__name__} knows {known} positions; "
            "shorten the prompt or ask for fewer new tokens"
        )


def _known(model: Any) -> int | None:
    # tracing is imported only where there is something to trace
    from eepass.passes.trace.decode_step import known_positions

    return known_positions(model)
