"""What passes of several rows and prompts cost, beside what memory allows and beside llama.cpp.

    python benchmarks/rows.py MODEL [--quantize keep|int4|...] [--isa NAME] [--json FILE]
                              [--with llama.cpp [--llama-cpp FOLDER]]

MODEL: smollm2, a .gguf file, a folder. A pass is dense and whole: embedding, layers, LM head, the
logits of every row. Systems and the streaming kernel are measured in turns, in blocks of about
0.15 s; a figure is the median of the rounds, a ratio the median of the ratios of blocks of one
round, and "spread" holds the quartiles of each. llama.cpp reads the model's own file, in a process
of its own; FOLDER holds another build of it (pip install --target). docs/benchmarks.md says what
each field means.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    # a checkout need not be installed
    sys.path[0] = str(ROOT)

import torch  # noqa: E402

import eepass  # noqa: E402
from benchmarks import row_times  # noqa: E402
from benchmarks.llama_process import LlamaProcess  # noqa: E402
from benchmarks.row_times import EEPASS, LLAMA, System  # noqa: E402
from eepass.checkpoints.models import DTYPES, gguf_of  # noqa: E402
from eepass.checkpoints.read_torchao import KINDS  # noqa: E402
from eepass.cli.console import table  # noqa: E402
from eepass.codegen.cpu import building, native  # noqa: E402
from eepass.codegen.cpu.stream import StreamBuffer  # noqa: E402
from eepass.errors import InputError  # noqa: E402
from eepass.lengths import usual_length  # noqa: E402
from eepass.model import EarlyExitModel  # noqa: E402
from eepass.runtime.decoder.side_inputs import Row  # noqa: E402

ROWS, PROMPTS = (1, 2, 4, 8, 16), (512, 1024)
# tokens of text before the rows
CONTEXT = 64
LENGTH = PROMPTS[-1] + CONTEXT
READINGS = 5


class Eepass:
    """The engine's decoder, dense."""

    def __init__(self, model: EarlyExitModel) -> None:
        self.engine = model.host_engine()

    @torch.no_grad()
    def passes(self, rows: int, count: int) -> list[float]:
        decoder, times = self.engine.decoder, []
        line = [Row(0, slot, slot) for slot in range(CONTEXT, CONTEXT + rows)]
        for _ in range(count):
            began = perf_counter()
            decoder.logits(decoder.forward(_tokens(rows), line, decoder.cache_length))
            times.append(perf_counter() - began)
        return times

    @torch.no_grad()
    def prefill(self, tokens: int) -> float:
        began = perf_counter()
        self.engine.start(_tokens(tokens), 1)
        seconds = perf_counter() - began
        self.engine.reset()
        return seconds


def _tokens(count: int) -> list[int]:
    return [(7 + 13 * index) % 97 for index in range(count)]


def file_bytes_a_pass(file: Path) -> int:
    """Bytes of a GGUF file that a pass has to read: not an embedding that is not the head."""
    from gguf import GGUFReader

    sizes = {tensor.name: int(tensor.n_bytes) for tensor in GGUFReader(str(file)).tensors}
    if "output.weight" in sizes:
        sizes.pop("token_embd.weight", None)
    return sum(sizes.values())


def prepare(options: argparse.Namespace) -> tuple[dict[str, System], dict[str, Any]]:
    """The systems, and what the report says of them."""
    if options.threads:
        torch.set_num_threads(options.threads)
    isa = chosen_isa(options.isa)
    loaded = eepass.load(options.model, options.dtype, quantize=options.quantize)
    model = loaded.model
    if not loaded.transformed:
        model = eepass.transform(model, None, max_length=usual_length(model, LENGTH))
    about = {
        "model": loaded.name, "quantize": options.quantize, "weights": loaded.quantization,
        "dtype": str(model.decoder.dtype).removeprefix("torch."), "isa": isa,
        "threads": torch.get_num_threads(), "context": CONTEXT,
        "longest": model.decoder.max_sequence_length,
        "bytes_a_pass": model.splits[1].bytes_a_pass,
    }  # fmt: skip
    systems: dict[str, System] = {EEPASS: Eepass(model)}
    if options.beside:
        file = gguf_of(options.model)
        llama = LlamaProcess(file, torch.get_num_threads(), LENGTH, CONTEXT, options.llama_cpp)
        systems[LLAMA], about["llama_cpp"] = llama, llama.info
    if options.quantize == "keep":
        about["file_bytes_a_pass"] = file_bytes_a_pass(gguf_of(options.model))
    return systems, about


def chosen_isa(name: str | None) -> str:
    """Which instruction set the kernels are to use; the one they use."""
    try:
        return native.kernel_isa(name)
    except building.KernelsMissing as error:
        raise InputError(f"--isa {name}: {error}") from error


def measure(
    systems: Mapping[str, System], about: Mapping[str, Any], rounds: int = row_times.ROUNDS
) -> dict[str, Any]:
    """The report."""
    stream = partial(StreamBuffer().gb_s, READINGS)
    passes, streams = row_times.measure_passes(systems, stream, ROWS, rounds)
    lengths = [length for length in PROMPTS if length < about["longest"]]
    prompts = row_times.measure_prompts(systems, lengths)
    sizes = {"roofline_fraction": about["bytes_a_pass"]}
    if "file_bytes_a_pass" in about:
        sizes["roofline_fraction_of_file"] = about["file_bytes_a_pass"]
    return {**about, "rounds": rounds, **row_times.figures_of(passes, streams, prompts, sizes)}


def show(report: Mapping[str, Any]) -> None:
    """The report as tables; ``--json`` has the spread."""
    passes, over = report["pass_ms"], report["rows_over_one"]
    table(
        f"{report['model']}: {report['weights'] or report['dtype']}, {report['isa']}, "
        f"{report['threads']} threads, memory {report['stream_gb_s']:.1f} GB/s, "
        f"{report['bytes_a_pass'] / 1e6:.0f} MB a pass",
        ("rows", *(f"{name}, ms" for name in passes), *(f"{name} over one" for name in passes),
         "of memory"),
        [
            (
                rows, *(f"{own[rows]:.2f}" for own in passes.values()),
                *(f"{own.get(rows, 1):.2f}" for own in over.values()), f"{share:.2f}",
            )
            for rows, share in report["roofline_fraction"].items()
        ],
    )  # fmt: skip
    speeds = report["prefill_tokens_per_s"]
    table(
        "prompts, tokens a second",
        ("tokens", *speeds),
        [(n, *(f"{own[n]:.0f}" for own in speeds.values())) for n in speeds[EEPASS]],
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--quantize", choices=("keep", *KINDS))
    parser.add_argument("--dtype", choices=DTYPES)
    parser.add_argument("--isa", help="instruction set of the kernels; the best there is")
    parser.add_argument("--with", dest="beside", choices=(LLAMA,), help="measure it as well")
    parser.add_argument("--llama-cpp", type=Path, help="folder of another build of llama.cpp")
    parser.add_argument("--rounds", type=int, default=row_times.ROUNDS)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the report here")
    return parser.parse_args()


def main() -> None:
    options = parse()
    try:
        systems, about = prepare(options)
        report = measure(systems, about, options.rounds)
    except InputError as error:
        raise SystemExit(f"error: {error}") from error
    show(report)
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
