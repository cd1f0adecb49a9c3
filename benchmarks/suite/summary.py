"""The aims beside what was measured, after each part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

COLUMNS = ("ms", "ratio", "roofline", "agreement", "layer", "tokens")


def summarize(sections: dict[str, Any], out: Path) -> dict[str, Any]:
    """Each aim beside its figure, and the systems as one table, also in ``out``/table.md."""
    found = {"aims": aims(sections), "systems": systems(sections)}
    lines = [
        "| system | ms/token | of HF compiled | of roofline | agreement | exit layer | per pass |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in found["systems"].items():
        shown = [_shown(row[key]) for key in COLUMNS]
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    (out / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return found


def systems(sections: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """By system: ms a token, speed by HF compiled's, roofline's share, agreement, exit layer, and
    tokens confirmed per pass."""
    side = sections.get("side by side") or {}
    roofline = (sections.get("bandwidth") or {}).get("roofline_ms")
    times = side.get("ms_per_token") or {}
    reference = times.get("hf compiled")
    rows = {}
    for name, ms in times.items():
        quality = side.get("quality", {}).get(name, {})
        rows[name] = {
            "ms": ms,
            "ratio": reference / ms if reference else None,
            "roofline": roofline / ms if roofline else None,
            "agreement": quality.get("agreement"),
            "layer": quality.get("mean_exit_layer"),
            "tokens": quality.get("tokens_a_pass"),
        }
    return rows


def aims(sections: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The design's aims on an H200; ``met`` is None where there is no figure."""
    found: dict[str, dict[str, Any]] = {}
    rows = systems(sections)

    def aim(name: str, figure: float | None, met: Any) -> None:
        found[name] = {"found": figure, "met": None if figure is None else bool(met(figure))}

    dense = rows.get("eepass dense, device", {})
    aim("dense, of the roofline, at least 0.85", dense.get("roofline"), lambda x: x >= 0.85)
    aim("dense, of HF compiled, at least 1", dense.get("ratio"), lambda x: x >= 1.0)
    never = (sections.get("never exit device") or {}).get("ratio")
    aim("never leaving, time of dense, at most 1.02", never, lambda x: x <= 1.02)
    for layer, pair in (sections.get("forced exit device") or {}).items():
        name = f"leaving after {layer}, time of the cut model, at most 1.05"
        aim(name, pair.get("ratio"), lambda x: x <= 1.05)
    depth = (sections.get("twin") or {}).get("layers")
    real = rows.get("eepass exits, device", {})
    share = None
    if depth and real.get("layer") and dense.get("ms") and real.get("ms"):
        share = dense["ms"] / real["ms"] / (depth / real["layer"])
    aim("real exits, of what the exit layer allows, at least 0.90", share, lambda x: x >= 0.9)
    ways = (sections.get("exact step device") or {}).get("ways", {})
    for way in ("text", "head and text"):
        name = f"exact, drafts of {way}: a whole pass by a dense one's time, at most 1.3"
        aim(name, ways.get(way, {}).get("pass_of_dense"), lambda x: x <= 1.3)
    report = (sections.get("step device") or {}).get("launch_report") or {}
    syncs = report.get("host_synchronisations")
    aim("host synchronisations a step, 0", syncs, lambda x: x == 0)
    return found


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
