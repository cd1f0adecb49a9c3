"""What a machine may lack or do to a command: said in a line, and the terminal as it was."""

import ctypes
import errno
import json
import os
import pty
import select
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from command_line import refused, run
from word_model import save_word_model, write_prompts

from eepass import files
from eepass.checkpoints.models import load_checkpoint
from eepass.cli import command as commands
from eepass.cli import train as train_command
from eepass.cli.causes import machine_cause, variable_of
from eepass.codegen.cpu import building, native
from eepass.errors import InputError, RunsSlower
from eepass.training.progress import claimed

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_word_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def prompts_file(tmp_path):
    return write_prompts(tmp_path / "prompts.jsonl")


def test_more_threads_than_can_be_started_are_refused(tmp_path, monkeypatch):
    for name in ("generate", "transform", "train", "bench"):
        more = ("--prompt", "w5") if name == "generate" else ("--out", tmp_path / "out")
        more = () if name == "bench" else more
        assert "--threads 100000: at most" in refused(name, "m/m", *more, "--threads", 100000)
    monkeypatch.setenv("OMP_NUM_THREADS", "100000,2")
    assert "OMP_NUM_THREADS=" in refused("inspect", "m/m")
    monkeypatch.setenv("OMP_NUM_THREADS", "4,2")
    commands.refuse_threads(8)


def test_figures_that_cannot_be_written_are_refused_before_the_work(tmp_path):
    (tmp_path / "file").touch()
    inspect = ("inspect", "no such model", "--json")
    assert "is a folder" in refused(*inspect, tmp_path)
    assert "file is no folder" in refused(*inspect, tmp_path / "file" / "a.json")
    # what may be written is found out by the model
    for file in (tmp_path / "new" / "a.json", tmp_path / "file", "/dev/null"):
        assert "no such model" in refused(*inspect, file)


def test_a_full_device_is_said_to_be_full_and_stays_a_device():
    with pytest.raises(InputError, match=r"/dev/full: cannot be written .*No space left"):
        commands.write_json(Path("/dev/full"), {})
    assert Path("/dev/full").is_char_device()


def test_safetensors_say_what_the_system_said(tmp_path, monkeypatch):
    def full(*arguments):
        raise files.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(OSError, match="No space left") as said:
        files.save_tensors(tmp_path / "a.safetensors", {})
    assert said.value.errno == errno.ENOSPC and said.value.filename.endswith("a.safetensors")


@pytest.mark.parametrize(
    ("variable", "place"),
    (
        ("TORCHINDUCTOR_CACHE_DIR", "/somewhere/inductor/a"),
        ("HF_HOME", "/somewhere/cache/huggingface/hub"),
        ("XDG_CACHE_HOME", "/somewhere/cache/eepass/gguf"),
        ("XDG_CONFIG_HOME", "/somewhere/config/eepass/signing.key"),
        (None, "/somewhere/else"),
    ),
)
def test_the_variable_that_helps_is_named(monkeypatch, variable, place):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/somewhere/inductor")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere/cache")
    monkeypatch.setenv("XDG_CONFIG_HOME", "/somewhere/config")
    monkeypatch.delenv("HF_HOME", raising=False)
    assert variable_of(Path(place)) == variable
    try:
        try:
            raise OSError(errno.EROFS, "Read-only file system", place)
        except OSError as error:
            raise RuntimeError("backend='inductor' raised") from error
    except RuntimeError as error:
        said = machine_cause(error)
    assert said.startswith(f"{place}: Read-only file system")
    assert (variable or "set ") in said or variable is None
    assert machine_cause(RuntimeError("of our own")) is None


def test_of_a_copy_the_full_side_is_named():
    error = OSError(errno.ENOSPC, "No space left on device", "/a/source", None, "/b/copy")
    assert machine_cause(error) == "/b/copy: No space left on device; make room"


def test_compiled_code_that_was_cut_short_is_named(tmp_path):
    library = tmp_path / "kept.main.so"
    library.write_bytes(b"")
    with pytest.raises(OSError, match="file too short") as caught:
        ctypes.CDLL(str(library))
    assert machine_cause(caught.value) == (
        f"{library}: file too short: its writing was cut short; delete it, and it is compiled again"
    )


def child(arguments, **environment):
    """A command of its own process: exit code, and what it said on the error stream."""
    done = subprocess.run(
        [sys.executable, "-m", "eepass", *map(str, arguments)], cwd=ROOT, text=True,
        capture_output=True, check=False, env={**os.environ, "TERM": "dumb", **environment},
    )  # fmt: skip
    return done.returncode, done.stderr


@pytest.mark.parametrize("compiler", ("missing", "failing"))
def test_a_compiler_that_does_not_work(model_folder, tmp_path, compiler):
    generate = ("generate", model_folder, "--prompt", "w5", "--max-new-tokens", 2, "--dense")
    lacking = {"missing": str(tmp_path / "g++"), "failing": "/bin/false"}
    code, said = child(
        generate, CXX=lacking[compiler], TMPDIR=str(tmp_path),
        TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "inductor"), XDG_CACHE_HOME=str(tmp_path / "cache"),
    )  # fmt: skip
    lines = [line for line in said.splitlines() if line.strip()]
    assert code == 2 and "Traceback" not in said, said
    assert lines[-1].startswith("error: ") and "CXX" in lines[-1], said


def test_a_closed_cache_is_not_blamed_on_the_model(model_folder):
    for name in ("generate", "inspect"):
        more = ("--prompt", "w5", "--max-new-tokens", 2) if name == "generate" else ()
        code, said = child((name, model_folder, *more), XDG_CACHE_HOME="/dev/null/cache")
        # slower, and it says so in a line that names the variable
        (line,) = [line for line in said.splitlines() if "warning: " in line]
        assert code == 0 and "XDG_CACHE_HOME" in line and "slow" in line, said


def test_a_closed_cache_of_a_gguf_file_is_named(tmp_path, monkeypatch):
    file = tmp_path / "a.gguf"
    file.write_bytes(b"GGUF")

    def closed(*arguments):
        raise OSError(errno.ENOTDIR, "Not a directory", str(building.cache_dir() / "gguf"))

    monkeypatch.setattr("eepass.checkpoints.models.load_gguf", closed)
    with pytest.raises(NotADirectoryError):
        load_checkpoint(str(file), "fp32", None, "int8")


def test_falling_back_to_reference_implementations_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/cache")
    native.load_kernels.cache_clear()
    try:
        with pytest.warns(RunsSlower, match="set XDG_CACHE_HOME"):
            assert native.load_kernels()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            # once
            assert native.load_kernels()
    finally:
        native.load_kernels.cache_clear()


def test_a_full_disk_while_a_folder_is_written(model_folder, tmp_path, monkeypatch):
    def full(*arguments):
        raise files.SafetensorError("I/O error: No space left on device (os error 28)")

    torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(files, "save_file", full)
    said = refused("transform", model_folder, "--out", tmp_path / "out", "--dense", "--rows", "1")
    assert "No space left" in said and "make room" in said
    assert not list(tmp_path.iterdir())


def test_two_trainings_in_one_folder(tmp_path):
    left = tmp_path / "checkpoint" / "shards" / ".fit-0.safetensors.123.part"
    left.parent.mkdir(parents=True)
    left.touch()
    with claimed(tmp_path / "checkpoint", tmp_path):
        assert not left.exists()
        with (
            pytest.raises(InputError, match="another process is writing it"),
            claimed(tmp_path / "checkpoint", tmp_path),
        ):
            pass
    assert sorted(p.name for p in (tmp_path / "checkpoint").iterdir()) == ["shards"]


@pytest.mark.parametrize("whose", ("world", "another user"))
def test_kernels_that_others_may_have_written_are_not_run(tmp_path, monkeypatch, whose):
    if whose == "another user" and os.geteuid() != 0:
        pytest.skip("only root may give files away")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library = building.library_of(building.find_compiler())
    library.parent.mkdir()
    library.write_bytes(b"something else")
    assert building.build_kernels() == library
    if whose == "world":
        library.parent.chmod(0o777)
    else:
        os.chown(library, 12345, 12345)
    with pytest.raises(building.KernelsMissing, match=r"others .* set XDG_CACHE_HOME"):
        building.build_kernels()


@pytest.mark.parametrize("name", ("train", "inspect"))
def test_only_of_a_training_it_is_said_that_it_resumes(monkeypatch, tmp_path, name):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    module = train_command if name == "train" else sys.modules["eepass.cli.inspect"]
    monkeypatch.setattr(module, "load_model", interrupted)
    code, _, said = run(name, "m/m", *(("--out", tmp_path / "out") if name == "train" else ()))
    assert code == 130 and said.startswith("stopped")
    assert ("the training resumes" in said) == (name == "train")


HIDE, SHOW = b"\x1b[?25l", b"\x1b[?25h"


@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
def test_a_signal_leaves_the_terminal_as_it_was(model_folder, prompts_file, tmp_path, number):
    """The cursor that bars hide comes back; the process ends as the signal asked."""
    main, other = pty.openpty()
    command = [sys.executable, "-m", "eepass", "train", str(model_folder), "--dtype", "fp32"]
    command += ["--prompts", str(prompts_file), "--out", str(tmp_path / "out"), "--tokens", "90000"]
    process = subprocess.Popen(
        command, cwd=ROOT, stdin=other, stdout=other, stderr=other, start_new_session=True,
        env={**os.environ, "TERM": "xterm"},
        # a shell's background jobs, such as a test run may be, ignore Ctrl-C
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    )  # fmt: skip
    os.close(other)
    said = b""
    while b"answers" not in said:
        said += os.read(main, 4096)
    process.send_signal(number)
    while select.select([main], [], [], 120)[0]:
        try:
            said += os.read(main, 4096)
        except OSError:
            break
    os.close(main)
    assert process.wait(timeout=120) == (130 if number == signal.SIGINT else -number), said
    assert said.rfind(SHOW) > said.rfind(HIDE) >= 0, said[-300:]
    assert b"Traceback" not in said, said


def test_what_was_ignored_stays_ignored():
    """As nohup starts it."""
    program = (
        "import os, signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "from eepass.cli.signals import stopping_cleanly\n"
        "with stopping_cleanly():\n"
        "    os.kill(os.getpid(), signal.SIGHUP)\n"
        "print('here')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "here\n"
    assert json.dumps(done.stderr) == '""'
