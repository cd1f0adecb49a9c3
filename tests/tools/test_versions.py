"""The matrix of versions: pairs that pass, fail or are not to be had, and the docs' table."""

import json
import sys

import pytest

from tools import versions

PAGE = f"# Versions\n\n{versions.BEGIN}\n| old |\n{versions.END}\n\nWhat follows.\n"
# stands in for an environment's python: pip, and pytest with its report
PYTHON = """#!{python}
import sys
from pathlib import Path
arguments = sys.argv[1:]
if "pip" in arguments:
    with Path({log!r}).open("a") as log:
        print(*arguments, file=log)
    if any(word == "torch==9.9.9" for word in arguments):
        print("Looking\\nERROR: No matching distribution for torch==9.9.9", file=sys.stderr)
        sys.exit(1)
    if "--dry-run" in arguments and "torch==2.14.1" in arguments:
        print("Would install nvidia-cublas-13.0 torch-2.14.1")
    sys.exit(0)
report = next(a for a in arguments if a.startswith("--junitxml="))[11:]
if "{says}":
    print("{says}", file=sys.stderr)
    sys.exit(4)
bad = '<testcase classname="tests.a" name="b"><failure/></testcase>' if "5.16.0" in report else ""
Path(report).write_text(
    '<testsuite><testcase name="one"/><testcase name="two"/>'
    f'<testcase name="three"><skipped/></testcase>{{bad}}</testsuite>'
)
sys.exit(bool(bad))
"""


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Environments whose python is a script; returns what pip was called with."""
    log = tmp_path / "pip.log"
    run = versions.subprocess.run

    def fake(command, **options):
        if "venv" in command:
            python = tmp_path / "keep" / command[-1] / "bin" / "python"
            python.parent.mkdir(parents=True, exist_ok=True)
            made = PYTHON.format(python=sys.executable, log=str(log), says=fake.says)
            python.write_text(made)
            python.chmod(0o755)
            return None
        return run(command, **options)

    fake.says = ""
    monkeypatch.setattr(versions.subprocess, "run", fake)
    return fake, log, tmp_path / "keep"


def test_pairs_that_pass_fail_and_cannot_be_had(machine, tmp_path, capsys):
    _, log, keep = machine
    page, found = tmp_path / "versions.md", tmp_path / "found.json"
    page.write_text(PAGE)
    pairs = "2.13.0/5.24.0,2.13.0/5.16.0,9.9.9/5.24.0,2.14.1/5.24.0"
    arguments = ["--pairs", pairs, "--keep", str(keep), "--docs", str(page), "--json", str(found)]
    assert versions.main(arguments) == 1
    rows = [
        "| 2.13.0 | 5.24.0 | 2 passed, 1 skipped |",
        "| 2.13.0 | 5.16.0 | 1 failed, 2 passed, 1 skipped: tests.a.b |",
        "| 9.9.9 | 5.24.0 | not installed: ERROR: No matching distribution for torch==9.9.9 |",
        "| 2.14.1 | 5.24.0 | not run: to be had with CUDA's libraries alone: --with-cuda |",
    ]
    assert capsys.readouterr().out.splitlines() == rows
    text = page.read_text()
    assert text.startswith("# Versions\n") and text.endswith(
        f"{rows[-1]}\n{versions.END}\n\nWhat follows.\n"
    )
    assert all(row in text for row in rows) and "| old |" not in text
    states = [outcome["state"] for outcome in json.loads(found.read_text())]
    assert states == ["passed", "failed", "not installed", "not run"]
    # what else is installed is what the project is tested with
    constraints = (keep / "2.13.0-5.24.0" / "constraints.txt").read_text().splitlines()
    assert {"torch==2.13.0", "transformers==5.24.0"} <= set(constraints)
    assert len([c for c in constraints if versions.name_of(c) == "transformers"]) == 1
    assert any(c.startswith("onnx==") for c in constraints)
    assert "transformers==5.24.0" in log.read_text()


def test_cuda_is_installed_where_it_is_asked_for_and_said(machine, capsys):
    _, _, keep = machine
    assert versions.main(["--pairs", "2.14.1/5.24.0", "--keep", str(keep), "--with-cuda"]) == 0
    assert "| 2.14.1 (built with CUDA, no device) | 5.24.0 | 2 passed" in capsys.readouterr().out


def test_an_environment_is_kept_only_when_it_is_whole(machine):
    _, log, keep = machine
    arguments = ["--pairs", "2.13.0/5.24.0", "--keep", str(keep)]
    assert versions.main(arguments) == 0
    installed = log.read_text()
    assert versions.main(arguments) == 0
    assert log.read_text() == installed
    (keep / "2.13.0-5.24.0" / "installed.txt").unlink()
    assert versions.main(arguments) == 0
    assert len(log.read_text()) == 2 * len(installed)


def test_tests_that_cannot_begin_are_a_failure(machine, capsys):
    fake, _, keep = machine
    fake.says = "no module named pytest"
    assert versions.main(["--pairs", "2.13.0/5.24.0", "--keep", str(keep)]) == 1
    assert "failed: no module named pytest" in capsys.readouterr().out


def test_an_environment_of_other_requirements_is_made_anew(machine, monkeypatch):
    _, log, keep = machine
    arguments = ["--pairs", "2.13.0/5.24.0", "--keep", str(keep)]
    assert versions.main(arguments) == 0
    monkeypatch.setattr(versions, "requirements", lambda: iter(["networkx>=3"]))
    assert versions.main(arguments) == 0
    assert "networkx>=3\n" in log.read_text()


def test_nothing_that_passed_is_a_failure(machine):
    assert versions.main(["--pairs", "9.9.9/5.24.0", "--keep", str(machine[2])]) == 1


def test_many_failures_are_counted():
    outcome = versions.Outcome("2.13.0", "5.24.0", "failed", 7, 0, list("abcde"))
    assert outcome.row().endswith("| 5 failed, 7 passed, 0 skipped: a; b; c and 2 more |")


def test_every_quick_test_is_there():
    assert all((versions.ROOT / name).exists() for name in versions.QUICK)


@pytest.mark.parametrize("pairs", ("2.13.0", "latest/5.24.0", "2.13.0/"))
def test_a_pair_that_is_none(pairs, capsys):
    with pytest.raises(SystemExit) as ended:
        versions.main(["--pairs", pairs])
    assert ended.value.code == 2 and "TORCH/TRANSFORMERS" in capsys.readouterr().err


def test_a_page_without_marks_is_an_error_before_anything_is_installed(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("# Versions\n")
    with pytest.raises(SystemExit):
        versions.main(["--docs", str(page)])
    assert versions.BEGIN in capsys.readouterr().err
