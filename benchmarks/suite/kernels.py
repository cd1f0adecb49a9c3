"""The kernels' own benchmark, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from benchmarks.suite.bench import ROOT, Bench
from benchmarks.suite.parts import Missing, Notify, Wrong

SCRIPT = ROOT / "benchmarks" / "kernels.py"
# with the checkout on the path, and not the script's folder: a package has the script's name
PROGRAM = (
    f"import runpy, sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv[0] = {str(SCRIPT)!r}; "
    "runpy.run_path(sys.argv[0], run_name='__main__')"
)


def kernels(bench: Bench, notify: Notify) -> dict[str, Any]:
    """Microseconds of each kernel and the share of the copy bandwidth it reaches; without a device,
    whether they are right in Triton's interpreter."""
    if not SCRIPT.is_file():
        raise Missing(f"{SCRIPT.relative_to(ROOT)} is not in this checkout")
    target = bench.out / "kernels.json"
    target.unlink(missing_ok=True)
    hidden = str(bench.twin.config.hidden_size if bench.on_cuda else 64)
    device = "cuda" if bench.on_cuda else "cpu"
    command = [sys.executable, "-c", PROGRAM, "--json", str(target.resolve()), "--hidden", hidden,
               "--device", device]  # fmt: skip
    try:
        ended = subprocess.run(
            command, cwd=ROOT, timeout=bench.seconds_left() - 2, stdout=sys.stderr, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise Missing(f"cut off after {error.timeout:.0f} s; what it had is in log.txt") from error
    if ended.returncode or not target.exists():
        raise Wrong(f"{SCRIPT.name} ended with {ended.returncode}; the end of log.txt says why")
    return dict(json.loads(target.read_text(encoding="utf-8")))
