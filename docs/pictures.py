"""Draw the pictures of the documentation from real models: ``make pictures`` (a minute).

The raw report that ``by_position`` is drawn from is measured anew only with ``--measure``.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from families.table import FAMILIES, tiny_model

import eepass
from eepass import inspecting, pictures
from eepass.config import ExitConfig

HERE = Path(__file__).parent / "pictures"
REPORT = HERE / "smollm2-by-position.json"
# python benchmarks/long_context.py --selected FILE
SELECTED = HERE / "smollm2-selected.json"
MEASURE = (
    "bench", "smollm2", "--no-baselines", "--no-frontier", "--limit", "4", "--new-tokens", "256",
    "--max-length", "448",
)  # fmt: skip


def main() -> None:
    HERE.mkdir(exist_ok=True)
    if "--measure" in sys.argv[1:]:
        command = [sys.executable, "-m", "eepass", *MEASURE, "--json", str(REPORT)]
        subprocess.run(command, check=True)
    draw_positions()
    chosen = json.loads(SELECTED.read_text(encoding="utf-8"))
    title = f"SmolLM2-135M: {chosen['tokens']} of {chosen['length']} tokens selected"
    pictures.selected(chosen, HERE / "selected.svg", title)
    loaded = eepass.load("smollm2")
    model = eepass.transform(loaded.model, loaded.artifact, ExitConfig().approximate(), 128)
    pictures.exit_graph(model.splits[1], model.plan, HERE / "smollm2.svg", "SmolLM2-135M")
    chain = inspecting.code_of(model).split("\n\n")[0].splitlines()
    (HERE / "smollm2.txt").write_text("\n".join(excerpt(chain)) + "\n", encoding="utf-8")
    gemma = eepass.transform(tiny_model(FAMILIES["gemma3"]), max_length=64)
    pictures.exit_graph(gemma.splits[1], None, HERE / "gemma3.svg", "a small Gemma 3")


def draw_positions() -> None:
    report = json.loads(REPORT.read_text(encoding="utf-8"))
    stretches = report["by_position"]
    title = f"SmolLM2-135M, {report['prompts']} prompts, asked for agreement 0.98"
    pictures.by_position(stretches, report["layers"], HERE / "by_position.svg", title)
    lines = ["| tokens of the answer | count | agreement | mean exit layer |", "|---|---|---|---|"]
    lines += [
        f"| {s['first']} to {s['last']} | {s['tokens']} | {s['agreement']:.3f} "
        f"| {s['mean_exit_layer']:.1f} of {report['layers']} |"
        for s in stretches
    ]
    said = f"\n`eepass {' '.join(MEASURE)} --json FILE`: [raw report](pictures/{REPORT.name})."
    (HERE / "by_position.md").write_text("\n".join([*lines, said]) + "\n", encoding="utf-8")
    raw = [f"- [{file.name}](pictures/{file.name})" for file in sorted(HERE.glob("*.json"))]
    (HERE / "reports.md").write_text("\n".join(raw) + "\n", encoding="utf-8")


def excerpt(code: list[str], shown: int = 14) -> list[str]:
    """The beginning and the end of a long listing, each line cut to a page's width."""
    cut = [line if len(line) < 110 else line[:106] + " ..." for line in code]
    return cut if len(cut) <= 2 * shown else [*cut[:shown], "    ...", *cut[-shown:]]


if __name__ == "__main__":
    main()
