"""What decoding came to, for a person: a small table and a sentence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from eepass.cli.console import console, table

NAMES = {
    "dense": "dense",
    "exits": "early exit",
    "speculation": "speculation",
    "both": "speculation with early exit",
}


def show_outcome(summary: Mapping[str, Any], decision: Mapping[str, Any]) -> None:
    """Show ``Statistics.summary()`` and ``Planner.decision()`` of a run."""
    table(
        "where tokens exited",
        ("layers run", "tokens"),
        [(str(n), str(count)) for n, count in enumerate(summary["exit_layers"]) if count],
    )
    table(
        "decoding",
        ("figure", "value"),
        [
            ("ms/token", f"{summary['ms_per_token']:.2f}"),
            ("tokens a pass", f"{summary['accepted_per_pass']:.2f}"),
            ("mean exit layer", f"{summary['mean_exit_layer']:.1f}"),
            *(
                (f"time in {name}", f"{summary[key]:.1%}")
                for name, key in (
                    ("drafts", "draft_share"),
                    ("predictors", "predictor_share"),
                    ("verification", "verify_share"),
                )
            ),
            ("rollbacks", str(summary["rollbacks"])),
            ("near ties", str(summary["near_ties"])),
        ],
    )
    console.print(outcome(summary, decision), highlight=False)


def outcome(summary: Mapping[str, Any], decision: Mapping[str, Any]) -> str:
    """One sentence: which way of decoding was used and the figures that decided it."""
    mode, used = decision["mode"], decision["ms_per_token"]
    figures = []
    if mode in ("speculation", "both"):
        figures.append(f"{summary['accepted_per_pass']:.1f} tokens a pass")
    if mode in ("exits", "both"):
        depth = len(summary["exit_layers"]) - 1
        figures.append(f"{summary['mean_exit_layer']:.1f} of {depth} layers a token")
    figures.append(f"{used.get(mode, summary['ms_per_token']):.1f} ms a token")
    if len(decision["modes"]) == 1:
        return f"{NAMES[mode]}, as asked: {', '.join(figures)}."
    tried = [f"{NAMES[other]} {ms:.1f} ms" for other, ms in used.items() if other != mode]
    if tried:
        figures[-1] += f" ({', '.join(tried)})"
    costs = decision["pass_ms"]
    rows = 4 if 4 in costs else max(costs)
    parts = [
        f"{NAMES[mode]} was fastest here: {', '.join(figures)}",
        f"a pass of {rows} rows costs {costs[rows]:.1f} ms, one row {costs[1]:.1f} ms",
    ]
    if decision["draft_hit_rate"] is not None:
        parts.append(f"drafts hit {decision['draft_hit_rate']:.2f}")
    return "; ".join(parts) + "."
