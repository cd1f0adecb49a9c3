"""What is still found in a long text when few of its tokens are selected, and what a token takes.

    python benchmarks/long_context.py [MODEL] [--length N] [--tokens K] [--json FILE]
        [--selected FILE] [--times]

One text of N tokens, made of this repository's documentation and code, holds ten sentences with a
number at ten depths and a list of pairs in its middle. It is run once; then each number and some of
the pairs are asked for, and code and prose are gone on with, by full attention and by each way of
selecting K tokens, in turns. ``oracle``: each layer selects for itself by its own attention. With
``--times`` no text is run: what a token takes does not depend on what it says.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from time import process_time
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
PAIRS, ASKED, DIGITS, GONE_ON, ROUNDS = 60, 6, 5, 48, 40


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
            engine.step([sequence])
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


def times(engine: Engine, ways: dict[str, Selection | None], length: int) -> dict[str, Any]:
    """Milliseconds of processor time of a token after ``length`` others by way, on one thread: what
    else the machine does hardly counts. Least and median of ``ROUNDS`` turns; keys and values are
    random, and nothing is run for them."""
    torch.set_num_threads(1)
    for tensor in (*engine.decoder.kv.keys, *engine.decoder.kv.values):
        tensor.normal_()
    sequence = engine.admit([5] * length)
    sequence.num_prefilled = length - 1
    engine.run_prompt(sequence)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(ROUNDS + 1):
        for name, way in ways.items():
            engine.selection = way
            sequence.replace_last(5)
            began = process_time()
            engine.step([sequence])
            if turn:
                seconds[name].append(1e3 * (process_time() - began))
    engine.end(sequence)
    return {
        name: {"least": round(min(own), 2), "median": round(statistics.median(own), 2)}
        for name, own in seconds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--length", type=int, default=7800)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--times", action="store_true", help="of a token, over random keys")
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
    if options.times:
        del ways["oracle"]
        with torch.no_grad():
            found_ms = times(engine, ways, options.length)
        print(json.dumps(found_ms, indent=1))
        if options.json:
            options.json.write_text(json.dumps(found_ms, indent=1) + "\n", encoding="utf-8")
        return
    runs = Runs(engine, text.ids, ways)
    report: dict[str, Any] = {
        "model": options.model, "length": len(text.ids), "tokens": options.tokens,
        "found": {}, "agreement": {},
    }  # fmt: skip
    with torch.no_grad():
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
    print(json.dumps(report, indent=1))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
