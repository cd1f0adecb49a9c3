"""What a prompt takes: its passes, and the time to the first token, beside the eager model's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from time import perf_counter
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import eepass
from benchmarks.suite import engines, measuring, reference
from benchmarks.suite.bench import Bench
from benchmarks.suite.parts import Notify
from eepass.codegen.lower_cuda import CudaCompiler
from eepass.model import EarlyExitModel
from eepass.passes.pipeline import split_for_rows
from eepass.runtime.step.launching import choose

LENGTHS, TINY_LENGTHS = (64, 256, 1024, 4096), (100, 300)
# rows of the tiny model's chunks, and slots of its cache
TINY_CHUNKS, TINY_SLOTS = (128, 256), 512


def prompts(bench: Bench, notify: Notify) -> dict[str, Any]:
    """By length, the row counts of a prompt's passes and the milliseconds to its first token: as
    it is run, in chunks of the smaller row count alone, and by the eager model."""
    model = _transformed(bench)
    found: dict[str, Any] = {}
    text = [token for ids in bench.prompts for token in ids]
    for length in LENGTHS if bench.on_cuda else TINY_LENGTHS:
        ids = (text * (length // len(text) + 1))[:length]
        token, passes = _passes(model, ids)
        _, logits = reference.follow(bench.twin, ids, [token])
        verdict, limit = reference.Verdict(), bench.limits[-1]
        verdict.judge(logits, [token], limit, f"the first token after {length}")
        systems = {
            "chunks": partial(_ms, bench, lambda ids=ids: next(model.stream(ids, 1))),
            "small chunks": partial(_ms, bench, lambda ids=ids: _in_small_chunks(model, ids)),
            "hf eager": partial(_ms, bench, lambda ids=ids: _eagerly(bench, ids)),
        }
        times = measuring.in_turns(bench, systems, bench.rounds)
        ms = measuring.medians(times)
        found[str(length)] = {
            "passes": passes, "ms": ms, "rounds": times,
            "tokens_per_second": 1e3 * length / ms["chunks"],
        }  # fmt: skip
        notify(found)
    model.close()
    return found


def _transformed(bench: Bench) -> EarlyExitModel:
    """The twin for long prompts. Nothing is captured: prompts never are."""
    if bench.on_cuda:
        longest = max(LENGTHS) + 1
        options: dict[str, Any] = {"max_length": longest, "device": "cuda", "launch": "calls"}
        made = eepass.transform(bench.twin, **options)
    else:
        with torch.no_grad():
            small, wide = TINY_CHUNKS
            splits, report = split_for_rows(bench.twin, TINY_SLOTS, (1,), small, wide_rows=(wide,))
        compiler = CudaCompiler(lambda graph, _: engines.not_compiled(graph, "", ()))
        launching = choose("host", bench.device)
        made = EarlyExitModel(
            splits, report, frozenset(), None, compiler=compiler, launching=launching
        )
    made.record(dense=True)
    return made


def _passes(model: EarlyExitModel, ids: list[int]) -> tuple[int, list[int]]:
    """The first token after ``ids``, and the row counts of the passes until then."""
    # steps run layers of their own
    sizes: list[int] = []
    with patch.object(model.decoder, "forward", partial(_noted, model.decoder.forward, sizes)):
        token = next(model.stream(ids, 1)).token
    return token, sizes


def _noted(forward: Callable[..., Tensor], sizes: list[int], *given: Any) -> Tensor:
    sizes.append(given[-1])
    return forward(*given)


def _in_small_chunks(model: EarlyExitModel, ids: list[int]) -> None:
    with patch.object(model.decoder, "chunks", model.decoder.chunks[:1]):
        next(model.stream(ids, 1))


@torch.no_grad()
def _eagerly(bench: Bench, ids: list[int]) -> None:
    text = torch.tensor([ids], device=bench.device)
    bench.twin(input_ids=text, logits_to_keep=1).logits.argmax().item()


def _ms(bench: Bench, run: Callable[[], Any]) -> float:
    bench.synchronize()
    began = perf_counter()
    run()
    return 1e3 * (perf_counter() - began)
