"""Pictures of the results so far, redrawn after each part."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

SIZE = (9, 4.5)
DENSE, OTHER = "#4477aa", "#bbbbbb"


def draw(values: dict[str, Any], out: Path, part: str) -> None:
    """Redraw the PNG file that ``part`` has a share in, if any; nothing without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return
    sections = values["sections"]
    if part == "side by side" and sections[part].get("ms_per_token"):
        _systems(sections, out / "side_by_side.png")
    kind = next((k for k in ("forced exit ", "step ", "equality ") if part.startswith(k)), None)
    if kind is None or not sections[part]:
        return
    found = {n.removeprefix(kind): s for n, s in sections.items() if s and n.startswith(kind)}
    if kind == "forced exit ":
        _forced(found, out / "forced_exit.png")
    elif kind == "step ":
        _steps(found, out / "step.png")
    else:
        every = {mode: own.get("exits", {}).get("exit_layers") for mode, own in found.items()}
        if exits := {mode: counts for mode, counts in every.items() if counts}:
            _exits(exits, out / "exit_layers.png")


def _figure() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(figsize=SIZE, layout="constrained")


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    # a reader never meets half a picture
    scratch = path.with_name(f".{path.name}")
    figure.savefig(scratch, dpi=120, format="png")
    scratch.replace(path)
    pyplot.close(figure)


def _systems(sections: dict[str, Any], path: Path) -> None:
    times = sections["side by side"]["ms_per_token"]
    figure, axes = _figure()
    names = list(times)[::-1]
    colours = [DENSE if name.startswith("eepass") else OTHER for name in names]
    bars = axes.barh(names, [times[name] for name in names], color=colours)
    axes.bar_label(bars, fmt="%.2f", padding=3)
    if roofline := (sections.get("bandwidth") or {}).get("roofline_ms"):
        axes.axvline(roofline, color="black", linestyle=":", label="weights read at copy bandwidth")
        figure.legend(loc="outside upper right")
    axes.margins(x=0.1)
    axes.set_xlabel("ms a token")
    _save(figure, path)


def _forced(parts: dict[str, Any], path: Path) -> None:
    figure, axes = _figure()
    for mode, found in parts.items():
        layers = [int(layer) for layer in found]
        for kind, line in (("forced", "-o"), ("cut", "--x")):
            times = [found[str(layer)]["ms_per_token"][kind] for layer in layers]
            axes.plot(layers, times, line, label=f"{mode}, {kind}")
    axes.set_xlabel("layers run")
    axes.set_ylabel("ms a token")
    axes.set_ylim(bottom=0)
    axes.legend()
    _save(figure, path)


def _steps(parts: dict[str, Any], path: Path) -> None:
    figure, axes = _figure()
    columns = {
        f"{mode}\n{how}": split
        for mode, found in parts.items()
        for how, split in found.items()
        if how != "launch_report" and "missing" not in split
    }
    base = [0.0] * len(columns)
    kinds = list(dict.fromkeys(kind for split in columns.values() for kind in split))
    for kind in kinds:
        heights = [split.get(kind, 0.0) for split in columns.values()]
        axes.bar(list(columns), heights, bottom=base, label=kind)
        base = [a + b for a, b in zip(base, heights, strict=True)]
    axes.set_ylabel("ms a token")
    axes.margins(y=0.05)
    figure.legend(loc="outside right upper")
    _save(figure, path)


def _exits(modes: dict[str, list[int]], path: Path) -> None:
    figure, axes = _figure()
    width = 0.8 / len(modes)
    for place, (mode, counts) in enumerate(modes.items()):
        at = [layer + place * width for layer in range(len(counts))]
        axes.bar(at, counts, width=width, label=mode)
    axes.set_xlabel("exit layer")
    axes.set_ylabel("tokens")
    axes.legend()
    _save(figure, path)
