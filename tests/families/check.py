"""Which decoder families can be transformed, each shown on a small random model.

For each: the layers found are those of its configuration; dense logits, keys, values and states
equal the eager model's (fp32); an exit forced after each layer equals the eager model with its list
of layers cut there; greedy decoding equals the eager model's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from models import eager_compile
from torch import Tensor

from eepass.codegen.lower_cpu import CpuCompiler
from eepass.errors import InputError, PassError
from eepass.passes.pipeline import split_decoder, split_for_rows
from eepass.runtime.decoder.decoder import Decoder
from eepass.runtime.decoder.stepwise import StepwiseDecoder
from eepass.segments import SplitDecoder
from families.plain_gpt import PlainGpt, split_plain
from families.reference import (
    CutModel,
    Memory,
    Reference,
    dense_error,
    exit_error,
    greedy_differs,
)
from families.table import FAMILIES, tiny_model

SLOTS = 48
TOLERANCE = 1e-5
PLAIN = ("plain torch.nn", "plain torch.nn, exported")
PLAIN_LAYERS = 3
# traced with 1, 4 and 8 rows; 2 are fitted between
STEP_ROWS, PREFILL_ROWS = (1, 2, 4), 8

Compiler = Literal["graph", "inductor"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """``status``: ok; refused, with the reason; failed, where it should not have been."""

    status: Literal["ok", "refused", "failed"]
    layers: int = 0
    max_error: float | None = None
    reason: str = ""


def names() -> tuple[str, ...]:
    return (*FAMILIES, *PLAIN)


def check_families(
    wanted: Sequence[str],
    compiler: Compiler,
    notify: Callable[[str, int, int], None] = lambda *_: None,
) -> dict[str, Outcome]:
    """Outcomes by family, those of ``wanted`` (all if empty); ``InputError`` for one unknown."""
    if unknown := sorted(set(wanted) - set(names())):
        raise InputError(f"unknown family {unknown[0]!r}; known: {', '.join(names())}")
    chosen = [name for name in names() if not wanted or name in wanted]
    found = {}
    for done, name in enumerate(chosen):
        notify("families", done, len(chosen))
        found[name] = check_family(name, compiler)
    notify("families", len(chosen), len(chosen))
    return found


def check_family(name: str, compiler: Compiler) -> Outcome:
    """All checks of one family.

    ``graph`` runs the traced segments as they are, one row at a time; ``inductor`` compiles them,
    for several row counts.
    """
    refused = FAMILIES[name].refused if name in FAMILIES else ""
    torch._dynamo.reset()
    try:
        with torch.no_grad():
            splits, reference, layers = _prepare(name, compiler)
            outcome = _checked(splits, reference, layers, compiler)
    except PassError as error:
        expected = refused and re.search(refused, str(error))
        return Outcome("refused" if expected else "failed", reason=str(error))
    finally:
        torch._dynamo.reset()
    if refused:
        return Outcome("failed", outcome.layers, outcome.max_error, "it should have been refused")
    return outcome


def _prepare(name: str, compiler: Compiler) -> tuple[Mapping[int, SplitDecoder], Reference, int]:
    several = compiler == "inductor"
    if name in PLAIN:
        torch.manual_seed(0)
        plain = PlainGpt(PLAIN_LAYERS, SLOTS).eval().requires_grad_(False)

        def in_one_go(ids: Sequence[int], depth: int) -> tuple[Tensor, list[Memory]]:
            logits, kept = plain.in_one_go(torch.tensor([list(ids)]), depth)
            return logits[0], kept

        rows = (1, 4) if several else (1,)
        exported = name == PLAIN[1]
        return {n: split_plain(plain, n, SLOTS, exported) for n in rows}, in_one_go, PLAIN_LAYERS
    family = FAMILIES[name]
    model = tiny_model(family)
    if several:
        splits, _ = split_for_rows(model, SLOTS, STEP_ROWS, PREFILL_ROWS)
    else:
        splits = {1: split_decoder(model, 1, SLOTS)[0]}
    return splits, CutModel(model, family.layers), family.layers


def _checked(
    splits: Mapping[int, SplitDecoder], reference: Reference, layers: int, compiler: Compiler
) -> Outcome:
    compile: Any = CpuCompiler() if compiler == "inductor" else eager_compile
    stepwise = len(splits) == 1
    decoder = StepwiseDecoder(splits[1], compile) if stepwise else Decoder(splits, compile)
    if decoder.num_layers != layers:
        return Outcome("failed", decoder.num_layers, reason=f"found instead of {layers} layers")
    dense = dense_error(decoder, reference)
    exits = exit_error(decoder, reference)
    error = max(dense, exits)
    where = "dense" if dense > TOLERANCE else "with exits"
    reason = f"{where} apart from the eager model" if error > TOLERANCE else ""
    reason = reason or greedy_differs(decoder, reference)
    return Outcome("failed" if reason else "ok", layers, error, reason)
