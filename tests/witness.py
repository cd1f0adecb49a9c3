"""A process that answers from a transformed folder, and what it did besides."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
# loads a folder and answers; prints what it said and what a mere loader may not have done
WITNESS = """
import json, os, sys
# with bindings to CUDA there, its import asks ldconfig
import torch
events = []
def watch(event, args):
    if event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork"):
        events.append([event, str(args[0])])
    if event == "open" and isinstance(args[0], str) and args[0].startswith(sys.argv[1]):
        if args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            events.append([event, args[0]])
sys.addaudithook(watch)
from eepass.cli.main import app
file = sys.argv[2]
try:
    app(["generate", sys.argv[1], "--json", file, *sys.argv[3:]])
except SystemExit as end:
    assert not end.code, end.code
found = json.load(open(file))
unwanted = ("torch._dynamo", "torch._inductor", "transformers", "networkx", "triton")
found["modules"] = sorted(
    name for name in sys.modules
    if name.startswith(unwanted) or "modeling_" in name.rpartition(".")[2]
)
found["events"] = events
json.dump(found, open(file, "w"))
"""


def start(folder, file, *options):
    """A process of its own that answers from ``folder``."""
    command = [sys.executable, "-c", WITNESS, str(folder), str(file), *map(str, options)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process, file):
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return json.loads(Path(file).read_text())
