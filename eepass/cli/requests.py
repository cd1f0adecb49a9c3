"""What a command line asks for, as objects; what is heavy is imported when it is needed."""

from __future__ import annotations

from typing import Any

from eepass.errors import InputError


def config_of(preset: str, **options: Any) -> Any:
    """The ``ExitConfig`` of a preset with ``options``; ValueError for what it cannot be."""
    from dataclasses import replace

    from eepass.config import ExitConfig

    base = ExitConfig.preset(preset)
    if preset == "paper":
        # a method as published has no such choices
        options = {k: v for k, v in options.items() if k in ("target_agreement", "kv")}
    return replace(base, **options)


def numbers(text: str, option: str) -> list[int]:
    """The whole numbers of ``text``, between commas; ``InputError`` naming ``option``."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"{option} {text}: expected numbers, as in 1,4,8") from None


def other_systems(names: list[str], model: str, threads: int, max_length: int) -> dict[str, Any]:
    """The systems named by ``--with``; ``InputError`` for one unknown or not installed."""
    import torch

    from eepass.benchmark.baselines import LlamaCpp
    from eepass.checkpoints.models import gguf_of

    if unknown := sorted(set(names) - {"llama.cpp"}):
        raise InputError(f"--with {unknown[0]}: expected llama.cpp")
    if not names:
        return {}
    return {"llama.cpp": LlamaCpp(gguf_of(model), threads or torch.get_num_threads(), max_length)}
