"""Runs parts as the supervisor asks for them: a line of JSON in, lines of JSON out."""

from __future__ import annotations

import importlib
import json
import os
import queue
import sys
import threading
import traceback
from time import monotonic
from typing import Any, TextIO

from benchmarks.suite.bench import Bench, Options
from benchmarks.suite.parts import Missing, Wrong, all_parts


def work(options: Options) -> None:
    """Run parts until there are no more requests; the process ends with the supervisor."""
    # whatever libraries print goes to the log
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    orders: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_listen, args=(orders,), daemon=True).start()
    bench = Bench(options)
    parts = {part.name: part for part in all_parts(options.device)}
    while True:
        order = json.loads(orders.get())
        part = parts[order["part"]]
        bench.ends = monotonic() + order["seconds"]
        bench.sections = order["sections"]
        print(f"--- {part.name}", file=sys.stderr, flush=True)
        _run(bench, part, answers)


def _run(bench: Bench, part: Any, answers: TextIO) -> None:
    from benchmarks.suite.results import plain

    def say(**values: Any) -> None:
        print(json.dumps(plain(values)), file=answers, flush=True)

    def notify(found: dict[str, Any]) -> None:
        say(found=found)

    module = importlib.import_module(f"benchmarks.suite.{part.module}")
    run = getattr(module, part.function)
    arguments = (part.argument,) if part.argument else ()
    try:
        say(found=run(bench, notify, *arguments), state="done")
    except Missing as error:
        say(state="skipped", why=str(error))
    except Wrong as error:
        say(state="failed", why=f"wrong: {error}", wrong=True)
    except Exception as error:
        # whatever a part meets, the parts after it are to run
        traceback.print_exc()
        why = (str(error).strip().splitlines() or [""])[0][:300]
        # after a fault of the device its context is lost: a new process has a new one
        say(state="failed", why=f"{type(error).__name__}: {why}", ends=bench.device_is_lost())


def _listen(orders: queue.Queue[str]) -> None:
    for line in sys.stdin:
        orders.put(line)
    os._exit(0)
