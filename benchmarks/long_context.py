"""What a long text costs to go on with, and what is still found in it when few tokens are selected.

    python benchmarks/long_context.py [MODEL] [--length N] [--tokens K] [--json FILE]
        [--selected FILE]

One text of N tokens, made of this repository's documentation and code, holds ten sentences with a
number at ten depths and a list of pairs in its middle. It is run once; then each number and some of
the pairs are asked for, and code and prose are gone on with, by full attention and by each way of
selecting K tokens, in turns. ``oracle``: each layer selects for itself by its own attention.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    # a checkout need not be installed
    sys.path[0] = str(ROOT)

import torch  # noqa: E402

import eepass  # noqa: E402
from eepass.codegen.cpu.native import load_kernels  # noqa: E402
from eepass.passes.pipeline import context_layers  # noqa: E402
from eepass.passes.report import PassReport  # noqa: E402
from eepass.runtime.context.selection import (  # noqa: E402
    LONG,
    OwnAttention,
    Recent,
    Selection,
)
from eepass.runtime.engine.engine import Engine  # noqa: E402

CITIES = [
    "Oslo",
    "Lima",
    "Cairo",
    "Quito",
    "Hanoi",
    "Dublin",
    "Madrid",
    "Athens",
    "Vienna",
    "Prague",
]
PAIRS, ASKED, DIGITS, GONE_ON = 60, 6, 5, 48


class Text:
    """``ids``: the text; ``questions`` by kind: what to add to it, and the answer that is right."""

    def __init__(self, encode: Any, length: int, seed: int = 0) -> None:
        chance = random.Random(seed)
        numbers = {city: str(chance.randrange(10**4, 10**5)) for city in CITIES}
        pairs = {f"{chance.choice(CITIES)}-{n}": str(chance.randrange(10**4, 10**5))
                 for n in chance.sample(range(10, 99), PAIRS)}  # fmt: skip
        listed = "\n\n" + "\n".join(f"{key} = {value}" for key, value in pairs.items()) + "\n\n"
        inserted = {}
        for at, (city, number) in enumerate(numbers.items()):
            said = (
                f"The number of {city} is {number}. Remember it: the number of {city} is {number}."
            )
            inserted[(at + 0.5) / len(CITIES)] = f"\n\n{said}\n\n"
        inserted[0.52] = listed
        filler = encode(_filler("docs/*.md") + _filler("codegen/*.py") + _filler("passes/*/*.py"))
        parts = {depth: encode(part) for depth, part in inserted.items()}
        size = length - sum(map(len, parts.values()))
        self.ids: list[int] = []
        # where each part stands
        self.stands: list[int] = []
        begin = 0
        for depth, part in sorted(parts.items()):
            end = int(depth * size)
            self.ids += filler[begin:end]
            if part is not parts[0.52]:
                self.stands.append(len(self.ids))
            self.ids += part
            begin = end
        self.ids += filler[begin:size]
        self.questions = {
            "needles": [(encode(f"\n\nThe number of {city} is"), number)
                        for city, number in numbers.items()],
            "pairs": [(encode(f"\n\n{key} ="), pairs[key])
                      for key in chance.sample(sorted(pairs), ASKED)],
        }  # fmt: skip
        code = encode((ROOT / "runtime/engine/verifier.py").read_text(encoding="utf-8"))
        prose = encode((ROOT / "README.md").read_text(encoding="utf-8"))
        self.beginnings = {"code": code[:160], "prose": prose[200:360]}


def _filler(pattern: str) -> str:
    return "".join(path.read_text(encoding="utf-8") for path in sorted(ROOT.glob(pattern)))


class Runs:
    """Continuations of one text in one engine, whose selection changes."""

    def __init__(self, engine: Engine, ids: Sequence[int], ways: dict[str, Selection | None]):
        self.engine, self.ids, self.ways = engine, list(ids), ways
        self.seconds: dict[str, list[float]] = {name: [] for name in ways}
        self.selecting = {name: 0.0 for name in ways}
        for name, way in ways.items():
            if way is not None:
                self._time(name, way)

    def go_on(self, way: str, more: Sequence[int], count: int, forced: Sequence[int] = ()) -> list:
        """``count`` tokens after the text and ``more``, or what would follow each of ``forced``.
        All of them, the first included, are decoded: the last of ``more`` goes through a step."""
        engine = self.engine
        ids = [*self.ids, *more]
        sequence = engine.admit(ids[:-1], capacity=len(ids) + count + 1, shares=True)
        engine.selection = self.ways[way]
        while not engine.run_prompt(sequence):
            pass
        sequence.replace_last(ids[-1])
        found = []
        for at in range(count):
            began = perf_counter()
            engine.step([sequence])
            if at:
                self.seconds[way].append(perf_counter() - began)
            found.append(sequence.tokens[-1])
            if forced:
                sequence.replace_last(forced[at])
        engine.end(sequence)
        return found

    def selected(self, way: str, more: Sequence[int], count: int) -> list[list[int]]:
        """The positions that each of ``count`` tokens after the text and ``more`` attends to from
        the last layer on that selects."""
        chosen: Any = self.ways[way]
        choose, found = chosen._choose, list[list[int]]()

        def kept(layer: int, *arguments: Any) -> Any:
            positions = choose(layer, *arguments)
            if layer == max(chosen.layers):
                found.append(positions.tolist())
            return positions

        chosen._choose = kept
        self.go_on(way, more, count)
        chosen._choose = choose
        return found

    def figures(self) -> dict[str, Any]:
        milliseconds = {name: 1e3 * statistics.median(own) for name, own in self.seconds.items()}
        shares = {name: round(self.selecting[name] / sum(self.seconds[name]), 3)
                  for name, own in self.ways.items() if own is not None}  # fmt: skip
        return {
            "ms_a_token": {name: round(own, 2) for name, own in milliseconds.items()},
            "times_as_fast": round(milliseconds["full"] / milliseconds["selected"], 2),
            "share_of_selecting": shares,
        }

    def _time(self, name: str, way: Any) -> None:
        select = way.select

        def timed(*arguments: Any) -> Any:
            began = perf_counter()
            found = select(*arguments)
            self.selecting[name] += perf_counter() - began
            return found

        way.select = timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--length", type=int, default=7800)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--selected", type=Path, help="write what was selected for some answers")
    options = parser.parse_args()
    if missing := load_kernels():
        raise SystemExit(f"error: {missing}")
    loaded = eepass.load(options.model, quantize="keep")

    def encode(text: str) -> list[int]:
        return loaded.tokenizer.encode(text, add_special_tokens=False)

    text = Text(encode, options.length)
    config = eepass.ExitConfig(
        guarantee="approximate", exits=False, speculate="off", context="selected",
        context_tokens=options.tokens,
    )  # fmt: skip
    made = eepass.transform(loaded.model, loaded.artifact, config, options.length + 300)
    engine, decoder = made.engine, made.decoder
    assert isinstance(engine, Engine)
    layers = range(decoder.num_layers)
    depths = [layer / decoder.num_layers for layer in layers]
    split = context_layers(made.splits[1], LONG * options.tokens, depths, PassReport())
    found = decoder.context[LONG * options.tokens]
    decoder.context[LONG * options.tokens] = {**found, 1: split}
    assert engine.selection is not None
    ways = {
        "full": None,
        "selected": engine.selection,
        "recent": Recent(options.tokens),
        "oracle": OwnAttention(options.tokens, split.queries, decoder),
    }
    runs = Runs(engine, text.ids, ways)
    report: dict[str, Any] = {
        "model": options.model, "length": len(text.ids), "tokens": options.tokens,
        "threads": torch.get_num_threads(), "found": {}, "agreement": {},
    }  # fmt: skip
    with torch.no_grad():
        began = perf_counter()
        runs.go_on("full", text.beginnings["code"][:2], 1)
        report["prompt_seconds"] = round(perf_counter() - began, 1)
        for kind, questions in text.questions.items():
            counts = dict.fromkeys(ways, 0)
            for question, right in questions:
                for way in ways:
                    answer = loaded.tokenizer.decode(runs.go_on(way, question, DIGITS + 1))
                    counts[way] += answer.strip().startswith(right)
            report["found"][kind] = {"of": len(questions), **counts}
            print(kind, report["found"][kind], flush=True)
        for kind, beginning in text.beginnings.items():
            answer = runs.go_on("full", beginning, GONE_ON)
            equal = {}
            for way in ways:
                said = runs.go_on(way, beginning, GONE_ON, answer)
                equal[way] = round(sum(map(int.__eq__, said, answer)) / GONE_ON, 3)
            report["agreement"][kind] = equal
            print(kind, equal, flush=True)
        if options.selected:
            answers = [
                {
                    "asked": CITIES[number],
                    "stands": text.stands[number],
                    "selected": runs.selected("selected", text.questions["needles"][number][0], 3),
                }
                for number in (2, 5, 8)
            ]
            sizes = {"length": len(text.ids), "tokens": options.tokens, "answers": answers}
            options.selected.write_text(json.dumps(sizes) + "\n", encoding="utf-8")
    report |= runs.figures()
    print(json.dumps(report, indent=1))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
