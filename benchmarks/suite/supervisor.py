"""Run the parts one after another in a process of their own, within the minutes given.

A part that crashes or hangs takes only itself along: its process is ended, the next part begins in
a new one, and what it had found is kept.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from typing import Any

from benchmarks.suite.parts import Part
from benchmarks.suite.results import Results, State

# seconds kept for the last plots
RESERVE = 3.0
# results so far, where they are written, the part that is over
After = Callable[[dict[str, Any], Path, str], None]


class Worker:
    """A process that runs parts by name and answers in lines of JSON."""

    def __init__(self, command: list[str], log: Path) -> None:
        self._log = log.open("ab")
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log,
            start_new_session=True,
        )  # fmt: skip
        self._lines: queue.Queue[bytes | None] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def begin(self, part: str, seconds: float, sections: dict[str, Any]) -> None:
        """Ask for a part; ``sections``: what parts before it have found."""
        order = {"part": part, "seconds": seconds, "sections": sections}
        assert self._process.stdin is not None
        # ``answer`` says that the process has ended
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
            self._process.stdin.flush()

    def answer(self, seconds: float) -> dict[str, Any] | None:
        """The next answer; None when the process has ended. ``queue.Empty`` after ``seconds``."""
        line = self._lines.get(timeout=max(seconds, 0.0))
        return None if line is None else json.loads(line)

    def end(self) -> int:
        """End the process and all it started; its exit code."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._log.close()
        return self._process.wait()


class Supervisor:
    """``command`` starts a worker; ``after`` is called after each part."""

    def __init__(
        self, parts: list[Part], command: list[str], results: Results, seconds: float, after: After,
        cheap: bool = False,
    ) -> None:  # fmt: skip
        """``cheap``: a tiny model, on which no part is expected to take its time."""
        self.parts, self.command, self.results, self.after = parts, command, results, after
        self.ends, self.cheap = monotonic() + seconds, cheap
        self._worker: Worker | None = None
        # the part without which no other makes sense, if it came to nothing
        self.ended_by = ""

    def run(self) -> None:
        """All parts; what was not begun when the time is up is named as such."""
        try:
            for part in self.parts:
                if self.ended_by:
                    self._record(part, "not begun", self.ended_by)
                else:
                    self._one(part)
            self.results.finish()
        finally:
            self._end_worker()

    def _one(self, part: Part) -> None:
        left = self.ends - monotonic() - RESERVE
        cost = 1.0 if self.cheap else part.cost
        if left < cost:
            why = f"it takes about {cost:.0f} s, {max(left, 0):.0f} s were left"
            self._record(part, "not begun", why)
            return
        if part.alone:
            self._end_worker()
        if self._worker is None:
            self._worker = Worker(self.command, self.results.path.with_name("log.txt"))
        self._record(part, "running")
        began = monotonic()
        limit = min(part.limit, left)
        self._worker.begin(part.name, limit, self.results.values["sections"])
        state, why, there = self._follow(part, began + limit)
        seconds = monotonic() - began
        self.after(self.results.values, self.results.path.parent, part.name)
        self._record(part, state, why, seconds)
        if part.alone:
            self._end_worker()
        if part.essential and not there:
            self.ended_by = f"{part.name}: {why}"

    def _follow(self, part: Part, until: float) -> tuple[State, str, bool]:
        """How the part ended, why, and whether what others need of it is there."""
        assert self._worker is not None
        while True:
            try:
                answer = self._worker.answer(until - monotonic())
            except queue.Empty:
                self._end_worker()
                return "cut off", "it ran past its time", False
            if answer is None:
                code = self._end_worker()
                why = f"its process ended with {code}; the end of log.txt says more"
                return "failed", why, False
            if answer.get("found") is not None:
                self.results.keep(part.name, answer["found"])
            if "state" in answer:
                if answer.get("ends"):
                    self._end_worker()
                there = answer["state"] == "done" or answer.get("wrong", False)
                return answer["state"], answer.get("why", ""), there

    def _record(
        self, part: Part, state: State, why: str = "", seconds: float | None = None
    ) -> None:
        self.results.record(part.name, state, why, seconds)
        if state != "running":
            took = "" if seconds is None else f"{seconds:6.1f} s"
            print(f"{part.name:22} {state:9} {took:8} {why}", flush=True)

    def _end_worker(self) -> int:
        worker, self._worker = self._worker, None
        return 0 if worker is None else worker.end()


def end_on_signals(supervisor: Supervisor) -> None:
    """On SIGTERM and SIGINT, end the worker and keep what was found."""

    def stop(number: int, frame: Any) -> None:
        # ``run`` ends the worker on its way out
        sys.exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
