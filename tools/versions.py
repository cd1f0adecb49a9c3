"""Run the quick tests with other versions of torch and transformers, and write what passed.

    python tools/versions.py [--pairs 2.13.0/5.24.0,...] [--with-cuda] [--keep DIR]
        [--docs docs/versions.md] [--json FILE]

Each pair gets an environment of its own, everything else from ``constraints.txt`` as far as the
pair allows it; the checkout is installed as it lies. ``--keep DIR`` holds environments for the next
run. A torch that is to be had with CUDA's libraries alone takes 6 GB and is only installed
``--with-cuda``. ``--docs`` writes the table between the two marks of that page. Exits with 1 if a
pair failed or none passed, with 2 for a mistake in the command.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# the ends, and the torch of `constraints.txt` with both transformers
PAIRS = ("2.11.0/5.17.0", "2.13.0/5.17.0", "2.13.0/5.24.0", "2.14.1/5.24.0")
# names of torch and transformers, tracing and passes, kernels and lowering, engine and step, doors
QUICK = (
    "tests/eepass/test_private_names.py", "tests/passes/test_find_layers.py",
    "tests/passes/test_split.py", "tests/codegen/test_lowering.py", "tests/codegen/test_loops.py",
    "tests/runtime/test_engine.py", "tests/runtime/test_speculation.py",
    "tests/runtime/test_step_engine.py", "tests/eepass/test_generation.py",
    "tests/eepass/test_gguf.py", "tests/eepass/backend/test_generate.py",
)  # fmt: skip
# failures named in the table
SHOWN = 3
BEGIN, END = "<!-- versions -->", "<!-- end of versions -->"
# transformers needs versions of its own of these, and torch brings its own of those
TIED, BROUGHT = {"huggingface_hub", "tokenizers"}, ("nvidia", "cuda", "triton")


@dataclass(frozen=True, slots=True)
class Outcome:
    """``state``: passed, failed, not installed, or not run; ``failures``: tests, or the reason."""

    torch: str
    transformers: str
    state: str
    passed: int = 0
    skipped: int = 0
    failures: list[str] = field(default_factory=list)

    def row(self) -> str:
        """Of the table in the docs."""
        found = f"{self.passed} passed, {self.skipped} skipped" if self.passed else self.state
        if self.failures:
            more = len(self.failures) - SHOWN
            names = "; ".join(self.failures[:SHOWN]) + (f" and {more} more" if more > 0 else "")
            found = f"{len(self.failures)} failed, {found}" if self.passed else found
            found += f": {names}"
        return f"| {self.torch} | {self.transformers} | {found} |"


class NotInstalled(Exception):
    """An environment cannot be made; the message says why."""


def run_pip(python: Path, *arguments: str) -> str:
    """Output of pip; raises ``NotInstalled`` with its last line of error."""
    command = [str(python), "-m", "pip", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise NotInstalled((lines or done.stderr.splitlines() or ["pip says nothing"])[-1])
    return done.stdout


def requirements() -> Iterator[str]:
    """What the tests need beside torch and transformers."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for name in ("serve", "gpu", "onnx", "quant", "docs"):
        yield from extras[name]
    yield from (r for r in (*project["dependencies"], *extras["dev"]) if not r.startswith("eepass"))


def name_of(requirement: str) -> str:
    """``huggingface_hub`` of ``huggingface-hub>=1.5``."""
    found = re.match(r"[\w.-]+", requirement)
    return found[0].replace("-", "_").lower() if found else ""


def make_environment(folder: Path, torch: str, transformers: str, with_cuda: bool) -> Path:
    """The Python of an environment with this pair; one that is whole, and was made for the same
    requirements, is taken as it is.

    Raises ``NotInstalled``.
    """
    python, ready = folder / "bin" / "python", folder / "installed.txt"
    asked = "\n".join([*requirements(), (ROOT / "constraints.txt").read_text()])
    digest = hashlib.sha256(asked.encode()).hexdigest()
    if ready.is_file() and digest in ready.read_text():
        return python
    try:
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise NotInstalled(f"no environment in {folder.name}: {error}") from None
    planned = run_pip(python, "install", "--dry-run", f"torch=={torch}")
    names = {name_of(name) for name in re.findall(r"([a-z][\w.-]*?)-\d", planned)}
    cuda = any(name.startswith("nvidia") for name in names)
    if cuda and not with_cuda:
        raise NotInstalled("to be had with CUDA's libraries alone: --with-cuda")
    brought = {"torch", "transformers", *(name for name in names if name.startswith(BROUGHT))}
    pinned = [f"torch=={torch}", f"transformers=={transformers}"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    constraints = folder / "constraints.txt"
    kept = [line for line in lines if name_of(line) not in brought | TIED]
    constraints.write_text("\n".join([*pinned, *kept]) + "\n")
    wanted = [r for r in requirements() if name_of(r) not in brought]
    run_pip(python, "install", "--quiet", f"torch=={torch}")
    run_pip(python, "install", "--quiet", "--constraint", str(constraints), *pinned, *wanted)
    # its ranges of versions are what is tried here; its entry points are tested
    run_pip(python, "install", "--quiet", "--no-deps", "--editable", str(ROOT))
    ready.write_text(f"torch {torch}{' with CUDA' if cuda else ''}\n{digest}\n")
    return python


def run_tests(python: Path, tests: Sequence[str], report: Path) -> tuple[int, int, list[str]]:
    """How many passed and were skipped, and the names of the others."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [str(python), "-m", "pytest", "-q", "-n", "2", "--dist", "loadfile"]
    command += ["-p", "no:cacheprovider", f"--junitxml={report}", *tests]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if not report.is_file():
        said = (done.stderr or done.stdout).strip() or "pytest says nothing"
        return 0, 0, said.splitlines()[-1:]
    cases = list(ElementTree.parse(report).iter("testcase"))
    bad = [case for case in cases if {"failure", "error"} & {child.tag for child in case}]
    skipped = sum(case.find("skipped") is not None for case in cases)
    names = [f"{case.get('classname')}.{case.get('name')}" for case in bad]
    if done.returncode and not names:
        names = [f"pytest ended with status {done.returncode}"]
    return len(cases) - len(bad) - skipped, skipped, names


def try_pair(pair: str, keep: Path, with_cuda: bool) -> Outcome:
    """An environment for ``pair`` under ``keep``, and the quick tests in it."""
    torch, transformers = pair.split("/")
    folder = keep / pair.replace("/", "-")
    try:
        python = make_environment(folder, torch, transformers, with_cuda)
    except NotInstalled as error:
        state = "not run" if "--with-cuda" in str(error) else "not installed"
        return Outcome(torch, transformers, state, failures=[str(error)])
    if "CUDA" in (folder / "installed.txt").read_text():
        torch += " (built with CUDA, no device)"
    report = folder / "report.xml"
    report.unlink(missing_ok=True)
    passed, skipped, failures = run_tests(python, QUICK, report)
    state = "failed" if failures or not passed else "passed"
    return Outcome(torch, transformers, state, passed, skipped, failures)


def write_table(page: Path, outcomes: Sequence[Outcome]) -> None:
    """Put the table between the marks of ``page``; raises ``ValueError`` where they are missing."""
    text = page.read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page}: no {BEGIN} and {END} to write between")
    head = "| torch | transformers | quick tests |\n|---|---|---|"
    rows = "\n".join(outcome.row() for outcome in outcomes)
    page.write_text(f"{before}{BEGIN}\n{head}\n{rows}\n{END}{after}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=lambda text: text.split(","), default=PAIRS)
    parser.add_argument("--with-cuda", action="store_true")
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--docs", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    if wrong := [p for p in options.pairs if not re.fullmatch(r"\d[\w.]*/\d[\w.]*", p)]:
        parser.error(f"{wrong[0]!r} is no pair TORCH/TRANSFORMERS, as 2.13.0/5.24.0")
    if options.docs and BEGIN not in options.docs.read_text():
        parser.error(f"{options.docs} has no {BEGIN}")
    outcomes = []
    with tempfile.TemporaryDirectory() as temporary:
        keep = (options.keep or Path(temporary)).resolve()
        for pair in options.pairs:
            outcomes.append(try_pair(pair, keep, options.with_cuda))
            print(outcomes[-1].row(), flush=True)
    if options.docs:
        write_table(options.docs, outcomes)
    if options.json:
        report = [asdict(outcome) for outcome in outcomes]
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    states = [outcome.state for outcome in outcomes]
    return int("failed" in states or "passed" not in states)


if __name__ == "__main__":
    sys.exit(main())
