"""Correctness and speed of eepass on a CUDA device, in one command and within given minutes.

    python benchmarks/gpu_suite.py --out DIR --minutes 9 [--gguf FILE | --parts DIR]
    python benchmarks/gpu_suite.py --out DIR --device cpu --tiny

``DIR/results.json`` and the plots are written after each part, so that a run that is cut off keeps
what it had. Needs a checkout, torch, transformers and the weights (docs/gpu.md); no network.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    # a checkout need not be installed
    sys.path[0] = str(ROOT)

from benchmarks.suite.parts import all_parts  # noqa: E402
from benchmarks.suite.plots import draw  # noqa: E402
from benchmarks.suite.results import Results  # noqa: E402
from benchmarks.suite.summary import summarize  # noqa: E402
from benchmarks.suite.supervisor import Supervisor, end_on_signals  # noqa: E402


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for results and plots")
    parser.add_argument("--minutes", type=float, default=9.0, help="all parts together")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a random tiny model, not smollm2")
    parser.add_argument("--factor", type=int, default=0, help="of the twin; 0: as memory allows")
    parser.add_argument("--new-tokens", type=int, default=0, help="per answer; 0: 128, or 16 tiny")
    parser.add_argument("--only", help="names of parts, separated by commas")
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument("--gguf", type=Path, help="SmolLM2-135M-Instruct as a GGUF file")
    weights.add_argument("--parts", type=Path, help="folder with that file in parts")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def after_each(values: dict[str, Any], out: Path, part: str) -> None:
    """Write table and plots, for a run that may be cut off."""
    values["summary"] = summarize(values["sections"], out)
    draw(values, out, part)


def main() -> int:
    given = parse()
    options = {
        name: getattr(given, name) for name in ("device", "tiny", "factor", "new_tokens")
    } | {name: str(getattr(given, name) or "") for name in ("gguf", "parts", "out")}
    if given.worker is not None:
        from benchmarks.suite.bench import Options
        from benchmarks.suite.worker import work

        work(Options(**json.loads(given.worker)))
    if given.minutes <= 0:
        print(f"error: --minutes {given.minutes:g}: give some time", file=sys.stderr)
        return 2
    parts = all_parts(given.device)
    if given.only is not None:
        wanted = [name.strip() for name in given.only.split(",")]
        if unknown := sorted(set(wanted) - {part.name for part in parts}):
            known = ", ".join(part.name for part in parts)
            print(f"error: --only {', '.join(unknown)}: known are {known}", file=sys.stderr)
            return 2
        parts = [part for part in parts if part.name in wanted]
    about = {
        "begun": datetime.now(UTC).isoformat(timespec="seconds"),
        "minutes": given.minutes,
        "options": {name: value for name, value in options.items() if name != "out"},
    }
    results = Results(given.out, [part.name for part in parts], about)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    command = [sys.executable, str(Path(__file__).resolve()), "--out", str(given.out)]
    command += ["--worker", json.dumps(options)]
    seconds = 60 * given.minutes
    supervisor = Supervisor(parts, command, results, seconds, after_each, cheap=given.tiny)
    end_on_signals(supervisor)
    supervisor.run()
    print(results.path)
    states = [part["state"] for part in results.values["parts"].values()]
    return 1 if "failed" in states or supervisor.ended_by else 0


if __name__ == "__main__":
    raise SystemExit(main())
