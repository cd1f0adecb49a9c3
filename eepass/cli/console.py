"""What a person sees in the terminal: progress, coloured text, tables, what decoding came to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from eepass.checkpoints.text_stream import TextStream

console = Console()
errors = Console(stderr=True)
# tokens of one pass come so soon after one another, in seconds
SAME_PASS = 1e-3
# the ways of decoding
MODE_NAMES = {
    "dense": "dense",
    "exits": "early exit",
    "speculation": "speculation",
    "both": "speculation with early exit",
}


class BarProgress:
    """Training's and benchmarks' progress as bars with time left."""

    def __init__(self, bars: Bars) -> None:
        self.bars = bars
        self.task: Any = None
        self.stage = ""

    def begin(self, stage: str, total: int) -> None:
        if self.task is not None:
            self.bars.update(self.task, completed=self.bars.tasks[self.task].total)
        self.task = self.bars.add_task(stage, total=max(total, 1))
        self.stage = stage

    def advance(self, amount: int) -> None:
        self.bars.advance(self.task, amount)

    def say(self, text: str) -> None:
        self.bars.console.print(text, highlight=False, markup=False)

    def notify(self, stage: str, done: int, total: int) -> None:
        """Set a stage's progress; a new stage, or one that starts over, gets a bar of its own."""
        if stage != self.stage or done == 0:
            self.begin(stage, total)
        self.bars.update(self.task, completed=done)


@contextmanager
def progress_bars() -> Iterator[BarProgress]:
    """Bars on the error stream, so that output stays clean; finished ones remain."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    with Bars(*columns, console=errors) as bars:
        yield BarProgress(bars)


def colour(layer: int, depth: int) -> str:
    """Colour of a token by its exit layer: green early, grey after all layers."""
    if layer >= depth:
        return "grey70"
    share = min(max((layer / depth - 0.6) / 0.4, 0.0), 1.0)
    return f"rgb({int(60 + 195 * share)},{int(220 - 20 * share)},90)"


class LiveAnswer:
    """Text as it streams, with running tokens per second.

    A token is coloured by its exit layer; green are those that came from the same pass as the one
    before.
    """

    def __init__(self, decode: Any, depth: int, title: str) -> None:
        self.depth, self.title = depth, title
        self.stream, self.text = TextStream(decode), Text()
        self.began = self.last = 0.0
        self.layers = self.passes = 0

    def __enter__(self) -> LiveAnswer:
        self.live = Live(self._render(), console=console, refresh_per_second=12)
        self.live.__enter__()
        return self

    def __exit__(self, *details: Any) -> None:
        self.live.update(self._render())
        self.live.__exit__(*details)

    def add(self, token: int, layer: int) -> None:
        now = perf_counter()
        along = bool(self.stream.ids) and now - self.last < SAME_PASS
        self.began, self.last = self.began or now, now
        self.passes += not along
        self.layers += layer
        style = "green" if along else colour(layer, self.depth)
        self.text.append(self.stream.add(token), style=style)
        self.live.update(self._render())
        # drawing is not decoding
        self.last = perf_counter()

    def _render(self) -> Text:
        shown, count = Text(f"{self.title}\n", style="bold") + self.text, len(self.stream.ids)
        if count > 1:
            rate = (count - 1) / max(perf_counter() - self.began, 1e-9)
            foot = f"\n{rate:.1f} tokens/s · {count / self.passes:.1f} tokens a pass · "
            foot += f"mean exit layer {self.layers / count:.1f} of {self.depth}"
            shown += Text(foot, style="dim")
        return shown


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    made = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for index, column in enumerate(columns):
        # a cell that is too wide is folded, never cut short
        made.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        made.add_row(*row)
    console.print(f"\n{title}", style="bold", highlight=False, markup=False)
    console.print(made)


def speed_up(value: float | None, spread: Mapping[str, Any]) -> str:
    """A measured ratio and the middle half of its blocks, or that the blocks disagree."""
    if value is None:
        ends = (spread["lowest"], spread["highest"])
        lowest, highest = (f"{end:.1f}" if end < 10 else f"{end:.0f}" for end in ends)
        return f"unstable ({lowest}-{highest}x)"
    return f"{value:.2f}x ({spread['lower']:.2f}-{spread['upper']:.2f})"


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
            ("time in drafts", f"{summary['draft_share']:.1%}"),
            ("time in predictors", f"{summary['predictor_share']:.1%}"),
            ("time in verification", f"{summary['verify_share']:.1%}"),
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
        return f"{MODE_NAMES[mode]}, as asked: {', '.join(figures)}."
    tried = [f"{MODE_NAMES[other]} {ms:.1f} ms" for other, ms in used.items() if other != mode]
    if tried:
        figures[-1] += f" ({', '.join(tried)})"
    costs = decision["pass_ms"]
    rows = 4 if 4 in costs else max(costs)
    parts = [
        f"{MODE_NAMES[mode]} was fastest here: {', '.join(figures)}",
        f"a pass of {rows} rows costs {costs[rows]:.1f} ms, one row {costs[1]:.1f} ms",
    ]
    if decision["draft_hit_rate"] is not None:
        parts.append(f"drafts hit {decision['draft_hit_rate']:.2f}")
    return "; ".join(parts) + "."
