"""What a person sees in the terminal: progress, tinted text, tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

console = Console()
errors = Console(stderr=True)


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


# tokens given together come so soon after one another, in seconds
SAME_PASS = 1e-3


def tint(layer: int, depth: int) -> str:
    """Colour of a token by the layer it left at: green early, grey all the way."""
    if layer >= depth:
        return "grey70"
    share = min(max((layer / depth - 0.6) / 0.4, 0.0), 1.0)
    return f"rgb({int(60 + 195 * share)},{int(220 - 20 * share)},90)"


class LiveAnswer:
    """Text as it streams, with running tokens per second.

    A token is tinted by the layer it left at; green are those that came along with the one before,
    from the same pass.
    """

    def __init__(self, decode: Any, depth: int, title: str) -> None:
        self.decode, self.depth, self.title = decode, depth, title
        self.ids: list[int] = []
        self.text = Text()
        # tokens whose text stands before what is decoded next, and tokens shown
        self.context = self.shown = 0
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
        along = bool(self.ids) and now - self.last < SAME_PASS
        self.began, self.last = self.began or now, now
        self.passes += not along
        self.ids.append(token)
        self.layers += layer
        # a token may be part of a character, and reads as what stands before it has it
        known = self.decode(self.ids[self.context : self.shown])
        whole = self.decode(self.ids[self.context :])
        if not whole.endswith("�"):
            style = "green" if along else tint(layer, self.depth)
            self.text.append(whole[len(known) :], style=style)
            self.context, self.shown = self.shown, len(self.ids)
        self.live.update(self._render())
        # drawing is not decoding
        self.last = perf_counter()

    def _render(self) -> Text:
        head = Text(f"{self.title}\n", style="bold")
        if len(self.ids) > 1:
            rate = (len(self.ids) - 1) / max(perf_counter() - self.began, 1e-9)
            mean = self.layers / len(self.ids)
            a_pass = len(self.ids) / self.passes
            foot = f"\n{rate:.1f} tokens/s · {a_pass:.1f} tokens a pass · "
            foot += f"mean exit layer {mean:.1f} of {self.depth}"
            return head + self.text + Text(foot, style="dim")
        return head + self.text


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    made = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        made.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        made.add_row(*row)
    console.print(made)


def show_bench(result: Mapping[str, Any]) -> None:
    """The tables of a benchmark."""
    rows = []
    for name, figures in result["systems"].items():
        rows.append(
            (
                name,
                f"{figures['ms_per_token']:.2f}",
                f"{figures['tokens_per_s']:.1f}",
                f"{result['ratios'][name]:.2f}x",
                f"{result['ratios_to_dense'][name]:.2f}x",
                f"{result['roofline_fraction'][name]:.2f}",
                *(
                    _cell(figures.get(key), form)
                    for key, form in (
                        ("accepted_per_pass", "{:.2f}"),
                        ("exact_match", "{:.2f}"),
                        ("near_ties", "{}"),
                        ("rollbacks", "{}"),
                        ("mean_exit_layer", "{:.1f}"),
                        ("agreement", "{:.3f}"),
                        ("draft_share", "{:.1%}"),
                        ("repetition_4gram", "{:.3f}"),
                        ("dense_nll", "{:.3f}"),
                    )
                ),
            )
        )
    columns = (
        "free running", "ms/token", "tokens/s", f"of {result['reference']}", "of dense",
        "of roofline", "a pass", "same", "near ties", "rollbacks", "exit layer", "agreement",
        "draft", "4-gram rep.", "dense nll",
    )  # fmt: skip
    table(
        f"{result['model']}: {result['prompts']} prompts x {result['new_tokens']} tokens, "
        f"{result['dtype']}, {result['threads']} threads",
        columns,
        rows,
    )
    table(
        "leaving early, along the dense answer, by position in the answer",
        ("tokens", "count", "agreement", "exit layer"),
        [
            (f"{s['first']} to {s['last']}", str(s["tokens"]), f"{s['agreement']:.4f}",
             f"{s['mean_exit_layer']:.1f}")
            for s in result["by_position"]
        ],
    )  # fmt: skip
    if result["frontier"]:
        table(
            "teacher-forced frontier",
            ("preset", "target", "agreement", "ms/token", "of dense", "exit layer", "predictors",
             "draft", "verify", "whole heads"),
            [
                (
                    p["preset"], f"{p['target']:.3f}", f"{p['agreement']:.4f}",
                    f"{p['ms_per_token']:.2f}", f"{p['ratio_to_dense']:.3f}x",
                    f"{p['mean_exit_layer']:.1f}", f"{p['predictor_share']:.1%}",
                    f"{p['draft_share']:.1%}", f"{p['verify_share']:.1%}",
                    f"{p['full_head_rate']:.1%}",
                )
                for p in result["frontier"]
            ],
        )  # fmt: skip


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)
