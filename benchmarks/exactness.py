"""How many greedy answers change where they should not: in eepass, and in other engines.

    python benchmarks/exactness.py [--model smollm2] [--prompts FILE] [--limit 50]
        [--new-tokens 64] [--vllm PYTHON] [--only ENGINE] [--json FILE]

Each engine is compared with itself: its answers alone, without speculation, are the reference; then
the same prompts are answered with speculation, and several at a time. What is not installed is
skipped. vLLM runs in an environment of its own, whose Python is given. ``--only`` adds an engine to
a file that has the others.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    # a checkout need not be installed
    sys.path[0] = str(ROOT)

import torch  # noqa: E402

import eepass  # noqa: E402
from benchmarks.answers import (  # noqa: E402
    Answers,
    eepass_answers,
    llama_answers,
    transformers_answers,
)
from benchmarks.vllm_answers import vllm_answers  # noqa: E402
from eepass.checkpoints.models import LoadedModel, gguf_of  # noqa: E402
from eepass.cli.console import errors, table  # noqa: E402
from eepass.codegen.cpu import native  # noqa: E402
from eepass.errors import InputError  # noqa: E402
from eepass.files import write_text_atomically  # noqa: E402
from eepass.training.corpus import read_prompts  # noqa: E402
from eepass.training.train import DEFAULT_PROMPTS  # noqa: E402

ENGINES = ("eepass", "transformers", "eepass-gguf", "llama.cpp", "vllm")
PACKAGES = ("torch", "transformers", "llama-cpp-python")
Ways = Iterator[tuple[str, Answers]]


def compared(ways: Ways, notify: Callable[[str], None]) -> list[dict[str, Any]]:
    """What ``ways`` of one engine gave, against the first of them."""
    reports: list[dict[str, Any]] = []
    expected: list[list[int]] = []
    for name, found in ways:
        expected = expected or found.tokens
        places = [
            {"prompt": prompt, "token": first_difference(wanted, had)}
            for prompt, (wanted, had) in enumerate(zip(expected, found.tokens, strict=True))
            if wanted != had
        ]
        tokens = sum(map(len, found.tokens))
        reports.append(
            {
                "way": name, "answers": len(found.tokens), "tokens": tokens,
                "different": len(places), "differences": places,
                "tokens_per_pass": tokens / found.passes if found.passes else None,
            }
        )  # fmt: skip
        notify(f"{name}: {len(places)} of {len(found.tokens)} answers change")
    return reports


def first_difference(some: Sequence[int], others: Sequence[int]) -> int:
    same = [one == other for one, other in zip(some, others, strict=False)]
    return same.index(False) if False in same else len(same)


def show(engines: dict[str, list[dict[str, Any]]]) -> None:
    for engine, (reference, *ways) in engines.items():
        table(
            f"{engine}, against {reference['way']}",
            ("", "answers that change", "first at token", "tokens a pass"),
            [
                (
                    way["way"],
                    f"{way['different']} of {way['answers']}",
                    str(min((place["token"] for place in way["differences"]), default="")),
                    f"{way['tokens_per_pass']:.2f}" if way["tokens_per_pass"] else "",
                )
                for way in ways
            ],
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--prompts", type=Path, default=DEFAULT_PROMPTS)
    parser.add_argument("--limit", type=int, default=50)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--vllm", type=Path, help="Python of an environment that has vllm")
    parser.add_argument("--only", action="append", choices=ENGINES)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    loaded = eepass.load(options.model)
    prompts = [loaded.encode(text) for text in read_prompts(options.prompts, options.limit)]
    count, context = options.new_tokens, max(map(len, prompts)) + options.new_tokens
    versions = {"eepass": eepass.__version__, "python": platform.python_version()}
    versions |= {name: importlib.metadata.version(name) for name in PACKAGES if _installed(name)}
    answers: dict[str, Callable[[], Ways]] = {
        "eepass": lambda: eepass_answers(loaded, prompts, count),
        "transformers": lambda: transformers_answers(loaded, prompts, count),
        "eepass-gguf": lambda: eepass_answers(_as_stored(options.model), prompts, count),
        "llama.cpp": lambda: llama_answers(
            gguf_of(options.model), prompts, count, loaded.stop, context
        ),
        "vllm": lambda: vllm_answers(options.vllm, loaded, prompts, count, versions),
    }
    found: dict[str, Any] = {
        "model": Path(options.model).name, "prompts": options.prompts.name, "count": len(prompts),
        "new_tokens": count, "processor": _processor(), "isa": native.kernel_isa() or "none",
        "threads": torch.get_num_threads(), "versions": versions, "skipped": {}, "engines": {},
    }  # fmt: skip
    if options.only and options.json and options.json.exists():
        _add_to(found, json.loads(options.json.read_text()), options.json)
    for engine in options.only or ENGINES:
        found["skipped"].pop(engine, None)
        try:
            found["engines"][engine] = compared(
                answers[engine](), lambda said, of=engine: say(f"{of}: {said}")
            )
        except InputError as error:
            found["skipped"][engine] = str(error)
            say(f"{engine}: skipped, {error}")
        if options.json:
            # an engine takes long, and one that fails later takes nothing away
            write_text_atomically(options.json, json.dumps(found, indent=1) + "\n")
    show(found["engines"])
    # eepass promises it, the others do not
    promised = [ways for engine, ways in found["engines"].items() if engine.startswith("eepass")]
    sys.exit(any(way["different"] for ways in promised for way in ways))


def _add_to(found: dict[str, Any], before: dict[str, Any], file: Path) -> None:
    """Put what was ``found`` before, with the same work on the same machine, beside it."""
    for name in ("versions", "skipped", "engines"):
        found[name].update({**before.pop(name), **found[name]})
    if before != {name: found[name] for name in before}:
        raise InputError(f"{file}: of another model, machine or other prompts; choose a new file")


def say(line: str) -> None:
    errors.print(line, highlight=False, markup=False, soft_wrap=True)


def _as_stored(model: str) -> LoadedModel:
    gguf_of(model)
    return eepass.load(model, quantize="keep")


def _installed(package: str) -> bool:
    try:
        return bool(importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return False


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
