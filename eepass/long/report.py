"""What texts of some length come to: bytes, whether they fit, what will be chosen."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from eepass.codegen.cpu.native import KernelsMissing
from eepass.codegen.cpu.stream import stream_gb_s
from eepass.config import ExitConfig
from eepass.long.memory import ContextMemory
from eepass.passes.report import PassReport
from eepass.runtime.context.selection import LONG
from eepass.segments import SplitDecoder

MEMORY = Path("/proc/meminfo")
# of the layers, those that attend to all of a text where the others attend to what was selected
IN_FULL = 0.2


def length_report(
    split: SplitDecoder, length: int, config: ExitConfig | None = None
) -> dict[str, Any]:
    """What one sequence of ``length`` tokens takes in the decoder ``split``, and how it is decoded.

    ``weights_mb``: of layers and LM head; ``cache_mb``: keys and values, all of which stay;
    ``available_mb``: free memory of the machine, None where it does not say; ``fits``, and ``why``
    not; ``passes``: for each kind of pass the megabytes it reads and the milliseconds that memory
    takes for them (None where it cannot be measured); ``chosen``: what exact answers will use, and
    ``why``.
    """
    config = config or ExitConfig()
    memory, tokens = ContextMemory.of(split), config.context_tokens
    cache, free = length * memory.token, available()
    speed = None
    with suppress(KernelsMissing):
        speed = stream_gb_s()
    read = {"full": memory.read(length)}
    refused = _refused(split, LONG * tokens)
    if length > LONG * tokens and not refused:
        read["selected"] = memory.read(length, tokens, 1 - IN_FULL)
        read["drafting"] = memory.read(length, tokens)
    passes = {
        name: {
            "mb": round(size / 1e6, 1),
            "ms": None if speed is None else round(size / speed / 1e6, 2),
        }
        for name, size in read.items()
    }
    found: dict[str, Any] = {
        "length": length,
        "weights_mb": round(memory.weights / 1e6, 1),
        "cache_mb": round(cache / 1e6, 1),
        "available_mb": None if free is None else round(free / 1e6, 1),
        **_fits(split, length, cache, free),
        "passes": passes,
    }
    chosen, why = "passes over all of the text", refused
    if length <= LONG * tokens:
        why = f"nothing is selected of up to {LONG * tokens} tokens"
    elif not refused:
        share = 1 - read["drafting"] / read["full"]
        why = f"passes that read the keys of {tokens} tokens alone read {share:.0%} less"
        if memory.drafting_pays(length, tokens):
            chosen = "passes over selected tokens draft for those, as far as that pays"
    return found | {"chosen": chosen, "why_chosen": why}


def available() -> int | None:
    """Bytes of memory that are free here; None where the system does not say."""
    with suppress(OSError, ValueError, IndexError):
        for line in MEMORY.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def _fits(split: SplitDecoder, length: int, cache: int, free: int | None) -> dict[str, Any]:
    why = ""
    if split.positions is not None and length > split.positions:
        why = f"the model knows {split.positions} positions"
    elif free is not None and cache > free:
        why = f"its keys and values are {cache / 1e6:.0f} MB, and {free / 1e6:.0f} MB are free"
    return {"fits": not why, "why": why}


def _refused(split: SplitDecoder, width: int) -> str:
    """Why nothing can be selected; empty where it can."""
    from eepass.errors import PassError
    from eepass.passes.pipeline import context_layers

    try:
        context_layers(split, width, [IN_FULL], PassReport())
    except PassError as error:
        return str(error).splitlines()[0]
    return ""


def as_text(found: dict[str, Any]) -> str:
    """The result of ``length_report`` as text."""
    free = found["available_mb"]
    lines = [
        f"{found['length']} tokens: weights {found['weights_mb']} MB, keys and values "
        f"{found['cache_mb']} MB, free memory {'unknown' if free is None else f'{free} MB'}",
        "they fit" if found["fits"] else f"they do not fit: {found['why']}",
    ]
    for name, own in found["passes"].items():
        took = "" if own["ms"] is None else f", {own['ms']} ms at the speed of memory"
        lines.append(f"  pass, {name}: reads {own['mb']} MB{took}")
    return "\n".join([*lines, f"exact answers: {found['chosen']} ({found['why_chosen']})"])
