"""One token's attention over a long text, beside the time its keys and values take to be read.

    python benchmarks/attention.py [--tokens 4096] [--rows 1] [--isa NAME] [--json FILE]

A measurement is one token, or a few rows, through ``eepass::attend_rows`` for every layer, each
with keys and values of its own, as in a pass: together they fit no cache. In turns with the
streaming kernel; ``over_stream`` is the time taken by the keys' and values' bytes at the speed of
the memory, the median of the rounds, with its quartiles.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    # a checkout need not be installed
    sys.path[0] = str(ROOT)

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.row_times import median_of, quartiles_of  # noqa: E402
from benchmarks.rows import READINGS, chosen_isa  # noqa: E402
from eepass.cli.console import table  # noqa: E402
from eepass.codegen.cpu.stream import StreamBuffer  # noqa: E402
from eepass.errors import InputError  # noqa: E402
from eepass.runtime.cache.kv_cache import KvCache  # noqa: E402

ROUNDS, PASSES = 15, 10
# slots behind the text, as in an engine's cache
SPARE = 64


@dataclass(frozen=True, slots=True)
class Shape:
    """The attention of a model: its layers, query heads, KV groups and channels of a head."""

    layers: int
    heads: int
    groups: int
    channels: int

    def bytes_a_token(self, tokens: int, itemsize: int = 2) -> int:
        """Bytes of keys and values that a token after ``tokens`` others reads."""
        return 2 * self.layers * self.groups * tokens * self.channels * itemsize


SHAPES = {
    "smollm2 (135M)": Shape(30, 9, 3, 64),
    "Qwen2.5-Coder-1.5B": Shape(28, 12, 2, 128),
}


class Attention:
    """``rows`` after ``tokens`` others attend to these in all layers of a model of ``shape``."""

    def __init__(self, shape: Shape, tokens: int, rows: int = 1) -> None:
        self.shape, slots = shape, tokens + SPARE
        like = torch.empty(1, shape.groups, slots, shape.channels, dtype=torch.bfloat16)
        cache = KvCache([(like, like)] * shape.layers, SPARE)
        for tensor in (*cache.keys, *cache.values):
            tensor.normal_()
        self.caches = [(k[0], v[0]) for k, v in zip(cache.keys, cache.values, strict=True)]
        self.query = torch.randn(shape.heads, rows, shape.channels).bfloat16()
        self.mask = torch.zeros(rows, slots, dtype=torch.bfloat16)
        self.mask[:, tokens:] = torch.finfo(torch.bfloat16).min

    def run(self) -> list[Tensor]:
        """What the rows get in each layer [Q, R, D]."""
        scale = self.shape.channels**-0.5
        attend = torch.ops.eepass.attend_rows
        return [attend(self.query, keys, values, self.mask, scale) for keys, values in self.caches]

    def seconds(self, passes: int) -> float:
        """The median of ``passes`` runs."""
        times = []
        for _ in range(passes):
            began = perf_counter()
            self.run()
            times.append(perf_counter() - began)
        return median_of(times)


def measure(tokens: int, rows: int) -> dict[str, Any]:
    """By model; ``StreamBuffer`` loads the kernels."""
    stream, found = StreamBuffer(), {}
    for name, shape in SHAPES.items():
        attention, size = Attention(shape, tokens, rows), shape.bytes_a_token(tokens)
        attention.run()
        times, ratios = [], []
        for _ in range(ROUNDS):
            seconds = attention.seconds(PASSES)
            times.append(1e3 * seconds)
            ratios.append(seconds * stream.gb_s(READINGS) * 1e9 / size)
        found[name] = {
            "bytes": size, "ms": median_of(times), "over_stream": median_of(ratios),
            "spread": {"ms": quartiles_of(times), "over_stream": quartiles_of(ratios)},
        }  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=4096, help="of text")
    parser.add_argument("--rows", type=int, default=1, help="of a pass")
    parser.add_argument("--isa", help="instruction set of the kernels; the best there is")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    torch.manual_seed(0)
    try:
        isa = chosen_isa(options.isa)
    except InputError as error:
        raise SystemExit(f"error: {error}") from error
    with torch.no_grad():
        found = measure(options.tokens, options.rows)
    table(
        f"{options.rows} rows after {options.tokens} tokens, {isa}, "
        f"{torch.get_num_threads()} threads",
        ("model", "MB", "ms", "over stream"),
        [
            (name, f"{f['bytes'] / 1e6:.0f}", f"{f['ms']:.2f}", f"{f['over_stream']:.2f}")
            for name, f in found.items()
        ],
    )
    if options.json is not None:
        report = {"tokens": options.tokens, "rows": options.rows, "isa": isa, "models": found}
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
