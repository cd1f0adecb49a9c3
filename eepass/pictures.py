"""Plots and drawings; matplotlib is imported only when one is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eepass.plan import ExitPlan
from eepass.segments import SplitDecoder

COLOURS = {"embed": "#8da0cb", "layer": "#a6cee3", "exit": "#66c2a5", "head": "#fc8d62"}
# of a text, in a picture of what was selected of it
PARTS = 240


def exit_layers(counts: Sequence[int], file: Path, title: str) -> None:
    """Bar chart of the exit layers of tokens; ``counts[0]`` is layer 0."""
    total = max(sum(counts), 1)
    axes = _axes(9, 3.6)
    layers = range(1, len(counts))
    axes.bar(layers, [100 * counts[n] / total for n in layers], color=COLOURS["exit"])
    mean = sum(n * counts[n] for n in layers) / total
    axes.axvline(mean, color=COLOURS["head"], linestyle="--", label=f"mean {mean:.1f}")
    axes.set(xlabel="layers run", ylabel="% of tokens", title=title, xlim=(0.4, len(counts) - 0.4))
    axes.legend(frameon=False)
    _save(axes, file)


def agreement(report: Mapping[str, Any], file: Path, title: str) -> None:
    """Agreement with the dense answer by layer, as ``eepass.probe`` reports it."""
    axes = _axes(8, 4)
    by_layer = report["agreement_by_layer"]
    axes.plot(range(1, len(by_layer) + 1), by_layer, marker="o", markersize=3, label="logit lens")
    if "translated" in report:
        points = report["translated"]["agreement_by_layer"]
        axes.plot([int(n) for n in points], list(points.values()), marker="s", label="translated")
    axes.axvline(
        report["first_agreement_mean"], color="grey", linestyle=":", label="first right, mean"
    )
    axes.set(xlabel="layers run", ylabel="agreement with the last layer", title=title, ylim=(0, 1))
    axes.legend(frameon=False)
    _save(axes, file)


def by_position(
    stretches: Sequence[Mapping[str, Any]], layers: int, file: Path, title: str
) -> None:
    """Agreement and mean exit layer by position in the answer, as ``eepass bench`` reports."""
    axes = _axes(8, 3.6)
    names = [f"{s['first']}–{s['last']}" for s in stretches]
    axes.plot(names, [s["agreement"] for s in stretches], marker="o", color=COLOURS["head"])
    axes.set(xlabel="token of the answer", ylabel="agreement", title=title, ylim=(0, 1.02))
    other = axes.twinx()
    means = [s["mean_exit_layer"] for s in stretches]
    other.bar(names, means, color=COLOURS["exit"], alpha=0.5, width=0.5)
    other.set(ylabel="mean exit layer", ylim=(0, layers))
    # bars behind the line
    axes.set_zorder(other.get_zorder() + 1)
    axes.patch.set_visible(False)
    _save(axes, file)


def selected(report: Mapping[str, Any], file: Path, title: str) -> None:
    """Which parts of a text were selected for the tokens of some answers, the darker the more of a
    part, as ``benchmarks/long_context.py`` reports; marked where what was asked for stands."""
    import numpy as np

    answers, length = report["answers"], report["length"]
    axes = _axes(10, 0.9 + 0.6 * len(answers))
    for row, answer in enumerate(answers):
        found = [np.histogram(own, PARTS, (0, length))[0] for own in answer["selected"]]
        axes.imshow(
            np.stack(found), cmap="Blues", aspect="auto", interpolation="none", vmin=0,
            vmax=length / PARTS, extent=(0, length, row + 0.9, row + 0.1),
        )  # fmt: skip
        axes.vlines(answer["stands"], row, row + 1, color=COLOURS["head"], linewidth=1.2)
    names = [answer["asked"] for answer in answers]
    axes.set(xlabel="position in the text", title=title, xlim=(0, length), ylim=(len(names), 0))
    axes.set_yticks([row + 0.5 for row in range(len(names))], names)
    _save(axes, file)


def exit_graph(split: SplitDecoder, plan: ExitPlan | None, file: Path, title: str) -> None:
    """The chain of segments with its exits, drawn left to right in rows."""
    import networkx as nx

    structures = list(dict.fromkeys(layer.structure for layer in split.layers))
    flow = nx.DiGraph()
    names = ["embed", *(f"layer {n}" for n in range(1, len(split.layers) + 1)), "head"]
    nx.add_path(flow, names)
    per_row = 8
    position, colour, label = {}, {}, {}
    for place, name in enumerate(names):
        row, column = divmod(place, per_row)
        position[name] = (column * 2.4, -row * 2.2)
        if name.startswith("layer"):
            letter = chr(ord("A") + structures.index(split.layers[place - 1].structure))
            colour[name], label[name] = COLOURS["layer"], f"{place}\n{letter}"
        else:
            colour[name], label[name] = COLOURS[name], name
    exits = plan.exits if plan else ()
    for point in exits:
        name, source = f"exit {point.layer}", f"layer {point.layer}"
        flow.add_edge(source, name)
        x, y = position[source]
        position[name] = (x, y - 1.0)
        colour[name] = COLOURS["exit"]
        label[name] = f"> {point.threshold:.2f}" + ("\nT" if point.translated else "")
    rows = -(-len(names) // per_row)
    axes = _axes(13, 1.7 * rows + 1.2)
    nodes = list(flow.nodes)
    nx.draw_networkx(
        flow, position, nodelist=nodes, ax=axes, labels=label, font_size=7, node_size=820,
        node_shape="s", node_color=[colour[n] for n in nodes], edge_color="#777777", arrowsize=8,
    )  # fmt: skip
    drafting = f"draft after layer {plan.draft_layer}, " if plan and plan.draft_layer else ""
    axes.set_title(
        f"{title}: {len(split.layers)} layers, {split.distinct_layers} distinct "
        f"({', '.join(chr(ord('A') + i) for i in range(len(structures)))}); {drafting}"
        f"{len(exits)} exits (> threshold; T: translated)"
    )
    axes.axis("off")
    _save(axes, file)


def _axes(width: float, height: float) -> Any:
    """Axes that fill a figure of so many inches."""
    import matplotlib

    matplotlib.use("Agg")
    # the same drawing is the same file, and its text stays text
    matplotlib.rcParams.update({"svg.hashsalt": "eepass", "svg.fonttype": "none"})
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(width, height), layout="constrained")[1]


def _save(axes: Any, file: Path) -> None:
    import matplotlib.pyplot as plt

    file.parent.mkdir(parents=True, exist_ok=True)
    undated = {"Date": None} if file.suffix == ".svg" else None
    axes.figure.savefig(file, dpi=130, metadata=undated)
    plt.close(axes.figure)
