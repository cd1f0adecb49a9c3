"""``gpu_suite.py`` where no step can be captured, the twin is off, Hugging Face's model cannot be
compiled, and one part hangs; takes the suite's options."""

import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path[0] = str(Path(__file__).parents[2])

from benchmarks import gpu_suite  # noqa: E402
from benchmarks.suite import bench, hugging_face, parts, times, worker  # noqa: E402
from eepass.runtime.step import launching  # noqa: E402

every, widen = parts.all_parts, bench.widen_model


def engine(*given):
    raise RuntimeError("CUDA error: operation not permitted when stream is capturing")


def compiled(bench):
    raise RuntimeError("no compiler")


def widen_wrongly(*given):
    model = widen(*given)
    model.base_model.norm.weight.mul_(1.01)
    return model


def hang(bench, notify):
    notify({"half": 1})
    time.sleep(600)


def all_parts(device):
    found = every(device)
    return [replace(p, limit=2.0) if p.name == "bandwidth" else p for p in found]


launching._engine, times.bandwidth = engine, hang
bench.widen_model, hugging_face.compiled = widen_wrongly, compiled
gpu_suite.all_parts = worker.all_parts = all_parts
# workers are started by this name
gpu_suite.__file__ = __file__
raise SystemExit(gpu_suite.main())
