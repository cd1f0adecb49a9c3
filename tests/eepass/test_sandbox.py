"""Code of a model is run where it can do no harm, and passes only where its tests ran."""

import socket
import time
from pathlib import Path

import pytest

from eepass.benchmark import sandbox
from eepass.benchmark.sandbox import SCRIPT, passes
from eepass.errors import InputError

try:
    passes("", ())
except InputError as error:
    pytest.skip(str(error), allow_module_level=True)

ADD = "def add(a, b):\n    return a + b\n"


def test_code_passes_where_every_test_does():
    assert passes(ADD, ["assert add(1, 2) == 3", "assert add('a', 'b') == 'ab'"])
    assert not passes(ADD, ["assert add(1, 2) == 3", "assert add(1, 2) == 4"])


@pytest.mark.parametrize(
    "code",
    [
        "def add(a, b) return a + b",
        "raise ValueError",
        # ends before its tests are run
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "print('passed'); raise SystemExit",
        "import os; os.kill(os.getpid(), 9)",
        "x = []\nwhile True: x.append(bytes(1 << 20))",
    ],
)
def test_code_that_does_not_get_through_fails(code):
    assert not passes(code, ["assert add(1, 2) == 3"], seconds=3, megabytes=256)


@pytest.mark.parametrize("code", ["while True: pass", "import time; time.sleep(60)"])
def test_it_ends_in_time(code):
    began = time.perf_counter()
    assert not passes(code, (), seconds=1)
    assert time.perf_counter() - began < 15


def test_it_reaches_no_network():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        connect = f"import socket; socket.create_connection(('127.0.0.1', {port}), 1).close()"
        exec(connect)
        assert not passes(connect, ())


def test_it_changes_no_file(tmp_path):
    kept = tmp_path / "kept"
    kept.write_text("as it was")
    assert passes(f"assert open({str(kept)!r}).read() == 'as it was'", ())
    assert not passes(f"open({str(kept)!r}, 'a')", ())
    assert not passes(f"import os; os.remove({str(kept)!r})", ())
    assert not passes(f"open({str(tmp_path / 'new')!r}, 'w')", ())
    assert kept.read_text() == "as it was"
    assert list(tmp_path.iterdir()) == [kept]


def test_it_leaves_no_process():
    assert passes("import os, time\nif not os.fork():\n    os.setsid()\n    time.sleep(600)", ())
    time.sleep(0.2)
    running = [
        path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if _readable(path)
    ]
    assert not any(str(SCRIPT).encode() in line for line in running)


def _readable(path):
    try:
        return bool(path.read_bytes())
    except OSError:
        return False


def test_without_confinement_nothing_is_run(monkeypatch, tmp_path):
    script = tmp_path / "refuses.py"
    script.write_text(f"import sys; sys.exit({sandbox.REFUSED})")
    monkeypatch.setattr(sandbox, "SCRIPT", script)
    with pytest.raises(InputError, match="namespaces"):
        passes("", ())
