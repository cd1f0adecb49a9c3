"""Answers that can be checked: code problems, each with its tests.

What a user of early exit gives up is not agreement but right answers, so they are counted: dense,
exact (whose answers must be the dense ones) and approximate at the configured target.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from eepass.benchmark.frontier import Notify
from eepass.benchmark.sandbox import passes
from eepass.checkpoints.models import LoadedModel
from eepass.config import ExitConfig
from eepass.errors import InputError
from eepass.model import EarlyExitModel
from eepass.reading import list_of, read_records
from eepass.runtime.engine.batch import Request, decode_batch
from eepass.runtime.engine.engine import Engine
from eepass.runtime.sampling import GREEDY

TASKS = ("mbpp",)
# problems answered at a time, as far as the cache has room
TOGETHER = 16
FENCED = re.compile(r"```[ \t]*(?:python|py)?[ \t]*\n(.*?)(?:\n```|\Z)", re.DOTALL | re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Problem:
    """``prompt`` asks for a function; ``tests`` are statements that fail where it is wrong, and
    ``setup`` is what they need before it."""

    prompt: str
    setup: str
    tests: tuple[str, ...]


def read_problems(path: Path, limit: int | None = None) -> list[Problem]:
    """Of a JSONL file, ``{"prompt": "...", "setup": "...", "tests": ["assert ..."]}`` a line.

    Raises ``InputError`` naming the file and the line.
    """
    form = '{"prompt": "...", "tests": ["assert ..."]}'
    problems = [problem for _, problem in islice(read_records(path, form, _problem), limit)]
    if not problems:
        raise InputError(f"{path}: no problems in it")
    return problems


def _problem(record: Any) -> Problem:
    tests = tuple(list_of(record["tests"]))
    found = Problem(record["prompt"], record.get("setup", ""), tests)
    if not tests or not all(isinstance(t, str) for t in (found.prompt, *tests)):
        raise TypeError
    "".join((found.prompt, found.setup, *tests)).encode()
    return found


def code_of(answer: str) -> str:
    """The code in an answer: its first fenced block, or all of it where there is none."""
    found = FENCED.search(answer)
    return found[1] if found else answer


def solved(problem: Problem, answer: str) -> bool:
    """Whether the code in ``answer`` passes the tests; it is run, confined."""
    return passes(f"{problem.setup}\n{code_of(answer)}", problem.tests)


def measure_task(
    loaded: LoadedModel,
    model: EarlyExitModel,
    problems: Sequence[Problem],
    new_tokens: int,
    config: ExitConfig,
    raw: bool = False,
    notify: Notify = lambda stage, done, total: None,
) -> dict[str, Any]:
    """The share of ``problems`` that each way of decoding solves, answering greedily once:
    ``TOGETHER`` of them at a time, but one by one where tokens exit unverified, since how long they
    may stay pending depends on the sequences beside them.

    Raises ``InputError`` where no problem fits the cache, and where an exact answer differs from
    the dense one for another reason than a near tie.
    """
    # before an hour of decoding
    passes("", ())
    engines = {
        "dense": model.host_engine(),
        "exact": model.host_engine(replace(config, guarantee="exact", kv="defer")),
    }
    if model.has_exits:
        engines["approximate"] = model.host_engine(config.approximate())
    asked = [(problem, loaded.encode(problem.prompt, raw)) for problem in problems]
    longest = model.decoder.max_sequence_length
    asked = [(problem, ids) for problem, ids in asked if len(ids) + new_tokens <= longest]
    if not asked:
        raise InputError("no problem fits the cache together with its answer: raise max_length")
    prompts = [ids for _, ids in asked]
    answers: dict[str, list[list[int]]] = {}
    for name, engine in engines.items():
        tell = partial(notify, f"answering, {name}")
        together = 1 if name == "approximate" else TOGETHER
        answers[name] = _answers(engine, prompts, new_tokens, model.stop, together, tell)
    right: dict[str, list[bool]] = {name: [] for name in engines}
    equal: dict[str, list[bool]] = {name: [] for name in engines}
    for done, (problem, _) in enumerate(asked):
        notify("testing", done, len(asked))
        outcomes: dict[tuple[int, ...], bool] = {}
        for name, found in answers.items():
            same = tuple(found[done])
            if same not in outcomes:
                text = loaded.tokenizer.decode(same, skip_special_tokens=True)
                outcomes[same] = solved(problem, text)
            right[name].append(outcomes[same])
            equal[name].append(found[done] == answers["dense"][done])
    if not all(equal["exact"]) and not engines["exact"].statistics.near_ties:
        raise InputError("an exact answer differs from the dense one without a near tie: a defect")
    return {
        "problems": len(right["dense"]),
        "new_tokens": new_tokens,
        "target_agreement": config.target_agreement,
        "systems": {
            name: {
                "pass_at_1": sum(found) / len(found),
                "same_answer": sum(equal[name]) / len(found),
                "solved": found,
            }
            for name, found in right.items()
        },
    }


def _answers(
    engine: Engine,
    prompts: Sequence[list[int]],
    new_tokens: int,
    stop: frozenset[int],
    together: int,
    notify: Callable[[int, int], None],
) -> list[list[int]]:
    """Greedy answers to ``prompts``, ``together`` at a time."""
    requests = [Request(ids, new_tokens, stop, GREEDY) for ids in prompts]
    answers: dict[Request, list[int]] = {request: [] for request in requests}
    for request, token in decode_batch(engine, requests, together):
        if not answers[request]:
            notify(sum(map(bool, answers.values())), len(requests))
        answers[request].append(token)
    return list(answers.values())
