"""Servers under load: eepass, eepass dense, eepass one after another, llama.cpp, vLLM.

    python benchmarks/serving.py MODEL --prompts FILE [--quantize keep] [--artifact DIR]
        [--clients 1,2,4,8,16] [--rate 0.5,1] [--seconds S | --requests N] [--rounds N]
        [--with llama.cpp [--llama PYTHON | --llama-server FILE] [--llama-model FILE]]
        [--with vllm --vllm PYTHON] [--server NAME=COMMAND] [--only NAME,...] [--json FILE]

MODEL: smollm2, a .gguf file, a folder. Prompts of 20 to 400 tokens and answers of 64 to 192, greedy
and streamed, the same for all systems; closed loops of so many clients, and Poisson arrivals at so
many requests a second. Each system is a server in processes of its own, stopped while another is
measured; they take turns, in blocks of --seconds or --requests, in an order that rotates. A rate is
the median of the rounds, a ratio the median of the ratios of blocks of one round.
docs/benchmarks.md says what each field means.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    # a checkout need not be installed
    sys.path[0] = str(ROOT)

import eepass  # noqa: E402
from benchmarks.under_load import systems as known  # noqa: E402
from benchmarks.under_load.figures import Block, compare  # noqa: E402
from benchmarks.under_load.servers import Server, System, running  # noqa: E402
from benchmarks.under_load.tables import show  # noqa: E402
from benchmarks.under_load.work import (  # noqa: E402
    ANSWER_TOKENS,
    PROMPT_TOKENS,
    Answer,
    Load,
    draw_order,
)
from eepass.checkpoints.read_torchao import KINDS  # noqa: E402
from eepass.cli.command import refuse_unwritable, write_json  # noqa: E402
from eepass.cli.console import progress_bars  # noqa: E402
from eepass.cli.signals import stopping_cleanly  # noqa: E402
from eepass.errors import InputError  # noqa: E402
from eepass.training.corpus import read_prompts  # noqa: E402

CLIENT = "benchmarks.under_load.client"
SECONDS, ROUNDS, SEED = 20.0, 3, 17
NONE = "none"

# by load, then by system: a block for each round
Blocks = dict[str, dict[str, list[Block]]]


class Work:
    """Draws what is asked for in a block: the same for every system."""

    def __init__(self, options: argparse.Namespace) -> None:
        texts = read_prompts(options.prompts)
        # as the servers load it, so that what is wrong with it is known before they start
        quantize = None if options.quantize == NONE else options.quantize
        tokenizer = eepass.load(options.model, quantize=quantize).tokenizer
        self.decode: Callable[[Sequence[int]], str] = lambda ids: tokenizer.decode(
            ids, skip_special_tokens=True
        )
        self.texts = [tokenizer(f"{text}\n\n")["input_ids"] for text in texts]
        self.seconds, self.number, self.seed = options.seconds, options.requests, options.seed

    def order(self, load: Load, turn: int) -> dict[str, Any]:
        seed = f"{self.seed} {turn} {load.name}"
        return draw_order(load, self.texts, self.decode, self.seconds, self.number, seed)

    def warm_up(self, clients: int) -> dict[str, Any]:
        """A request for each client."""
        load = Load(clients=clients)
        return draw_order(load, self.texts, self.decode, None, clients, f"{self.seed} warm-up")


def measure_block(server: Server, order: Mapping[str, Any]) -> Block:
    """Let the client's process carry out ``order``; the server runs only meanwhile."""
    server.resume()
    server.forget_peak()
    asked = {**order, "url": server.url, "model": server.model, "extra": server.extra}
    ran = subprocess.run(
        [sys.executable, "-m", CLIENT], input=json.dumps(asked), capture_output=True, text=True,
        check=False, cwd=ROOT,
    )  # fmt: skip
    if ran.returncode:
        raise InputError(f"{server.name}: the client failed: {ran.stderr.strip().splitlines()[-1]}")
    server.refuse_ended()
    peak = server.peak_mb()
    server.pause()
    found = json.loads(ran.stdout)
    answers = [Answer(**answer) for answer in found["answers"]]
    return Block(answers, found["window"], peak, found["cpu"])


def measure(
    servers: Mapping[str, Server], loads: Sequence[Load], work: Work, rounds: int
) -> Iterator[Blocks]:
    """All loads, ``rounds`` times, the servers in turns; yields what there is after each round."""
    blocks: Blocks = {load.name: {name: [] for name in servers} for load in loads}
    names = list(servers)
    done, total = 0, rounds * len(loads) * len(names)
    with progress_bars() as bars:
        for turn in range(rounds):
            for place, load in enumerate(loads):
                order, first = work.order(load, turn), (turn + place) % len(names)
                for name in names[first:] + names[:first]:
                    bars.notify("measuring", done, total)
                    blocks[load.name][name].append(measure_block(servers[name], order))
                    done += 1
            bars.notify("measuring", done, total)
            yield blocks


def report_of(about: Mapping[str, Any], loads: Sequence[Load], blocks: Blocks) -> dict[str, Any]:
    """Figures by kind of load, load and system."""
    found = {load.name: compare(blocks[load.name], known.REFERENCES, known.EXACT) for load in loads}
    return {
        **about,
        "clients": {load.name: found[load.name] for load in loads if load.clients},
        "rates": {load.name: found[load.name] for load in loads if load.rate},
    }


def start(
    chosen: Mapping[str, System], folder: Path, work: Work, clients: int, stack: ExitStack
) -> dict[str, Server]:
    """The servers, warmed up by one request and by one of each client; ``stack`` stops them."""
    servers: dict[str, Server] = {}
    with progress_bars() as bars:
        for name, system in chosen.items():
            bars.notify("starting servers", len(servers), len(chosen))
            servers[name] = stack.enter_context(running(system, folder))
            for number in (1, clients):
                measure_block(servers[name], work.warm_up(number))
        bars.notify("starting servers", len(servers), len(chosen))
    return servers


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Start the servers, measure, stop them; the report is written after each round."""
    refuse_unwritable(options.json)
    loads = [Load(clients=n) for n in options.clients] + [Load(rate=r) for r in options.rate]
    report: dict[str, Any] = {}
    with TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        chosen, work = known.all_systems(options, folder), Work(options)
        about = {
            "model": Path(options.model).name, "quantize": options.quantize,
            "artifact": options.artifact and options.artifact.name,
            "prompts": options.prompts.name, "prompt_tokens": PROMPT_TOKENS,
            "answer_tokens": ANSWER_TOKENS, "seconds": options.seconds,
            "requests": options.requests, "seed": options.seed, "threads": options.threads,
            "versions": known.versions(chosen, options),
        }  # fmt: skip
        servers = start(chosen, folder, work, max(options.clients), stack)
        for turn, blocks in enumerate(measure(servers, loads, work, options.rounds), 1):
            report = report_of({**about, "rounds": turn}, loads, blocks)
            write_json(options.json, report)
    return report


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model")
    add("--prompts", type=Path, required=True, help='JSONL, {"prompt": "..."} a line')
    add("--quantize", choices=(NONE, "keep", *KINDS), default=NONE, help="none: bf16")
    add("--artifact", type=Path, help="folder eepass train wrote")
    add("--clients", type=listed(int), default=[1, 2, 4, 8, 16], help="numbers of closed loops")
    add("--rate", type=listed(float), default=[], help="Poisson arrivals, requests a second")
    block = parser.add_mutually_exclusive_group()
    block.add_argument("--seconds", type=float, help=f"of a block; {SECONDS:g} unless given")
    block.add_argument("--requests", type=int, help="of a block")
    add("--rounds", type=int, default=ROUNDS)
    add("--seed", type=int, default=SEED, help="of prompts, lengths and arrivals")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of each server")
    add("--with", dest="beside", action="append", choices=known.OTHERS, default=[])
    add("--llama", default=sys.executable, help="interpreter with llama-cpp-python[server]")
    add("--llama-server", type=Path, help="llama.cpp's own server, instead of Python's")
    add("--llama-model", type=Path, help="another GGUF file for llama.cpp")
    add("--vllm", help="interpreter that vLLM is installed for")
    add("--server", action="append", default=[], help="another: NAME=COMMAND with {port} in it")
    add("--only", type=listed(str), help="names of the systems to measure")
    add("--json", type=Path, help="write the report here")
    options = parser.parse_args()
    if options.seconds is None and options.requests is None:
        options.seconds = SECONDS
    for name in ("clients", "rate", "seconds", "requests", "rounds", "threads"):
        given = getattr(options, name)
        values = given if isinstance(given, list) else [given]
        if any(value is not None and value <= 0 for value in values):
            parser.error(f"--{name}: must be above 0")
    return options


def listed(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """Reads values of a kind, separated by commas."""

    def values(text: str) -> list[Any]:
        return [kind(part.strip()) for part in text.split(",")]

    values.__name__ = f"list of {kind.__name__}"
    return values


def main() -> None:
    options = parse()
    try:
        with stopping_cleanly():
            report = run(options)
    except InputError as error:
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit("stopped") from None
    show(report)


if __name__ == "__main__":
    main()
