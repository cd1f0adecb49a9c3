"""Folders are replaced whole, by one process at a time, wherever they lie."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from eepass import folders
from eepass.errors import InputError
from eepass.files import write_text_atomically
from eepass.folders import replacing_folder, scratch_folder

ROOT = Path(__file__).parents[2]


def ours(folder):
    return (folder / "mark").exists()


def replace(target, text):
    with replacing_folder(target, ours) as scratch:
        (scratch / "mark").write_text(text)
        (scratch / text).touch()


def contents(target):
    return sorted(path.name for path in target.iterdir())


def test_a_folder_takes_the_place_of_another(tmp_path):
    target = tmp_path / "new" / "folder"
    for text in ("one", "two"):
        replace(target, text)
        assert contents(target) == sorted(["mark", text])
    with pytest.raises(KeyboardInterrupt), replacing_folder(target, ours) as scratch:
        (scratch / "mark").touch()
        raise KeyboardInterrupt
    assert contents(target) == ["mark", "two"] and contents(target.parent) == ["folder"]
    # whoever may enter other new folders may enter this one
    (tmp_path / "other").mkdir()
    assert target.stat().st_mode == (tmp_path / "other").stat().st_mode


def test_two_at_once_have_folders_of_their_own_and_one_is_told(tmp_path):
    target = tmp_path / "folder"
    with replacing_folder(target, ours) as scratch:
        (scratch / "mark").write_text("first")
        with pytest.raises(InputError, match="another process is writing it"):
            replace(target, "second")
        # others are not in each other's way
        replace(tmp_path / "folder.b", "third")
        replace(tmp_path / "b", "fourth")
        assert (scratch / "mark").read_text() == "first"
    assert contents(target) == ["mark"]
    replace(target, "second")
    assert contents(target) == ["mark", "second"]


def test_what_a_killed_process_left_is_removed_and_its_lock_gone(tmp_path):
    target = tmp_path / "folder"
    program = (
        "import os, signal, sys; from pathlib import Path; from eepass.folders import *\n"
        "with replacing_folder(Path(sys.argv[1]), lambda folder: True) as scratch:\n"
        "    (scratch / 'half').touch()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    command = [sys.executable, "-c", program, str(target)]
    for _ in range(2):
        assert subprocess.run(command, cwd=ROOT, check=False).returncode == -9
    # of the second alone: a folder and a lock that nobody holds
    assert len(contents(tmp_path)) == 2 and not target.exists()
    replace(target, "one")
    assert contents(tmp_path) == ["folder"]


def test_what_appears_meanwhile_is_not_removed(tmp_path):
    target = tmp_path / "folder"
    with pytest.raises(InputError, match="something else"), replacing_folder(target, ours):
        target.mkdir()
        (target / "thesis.tex").touch()
    assert contents(target) == ["thesis.tex"]


@pytest.mark.parametrize("how", ("volume", "bound", "layer"))
def test_a_folder_that_cannot_be_moved_gets_other_contents(tmp_path, monkeypatch, how):
    """As on a container's volume; ``layer``: noticed when it is too late."""
    target = tmp_path / "volume"
    target.mkdir()
    (target / "lost+found").mkdir()
    real = os.rename

    def rename(source, destination):
        if how == "bound" and Path(source).parent == tmp_path:
            raise OSError(18, "Invalid cross-device link")
        real(source, destination)

    def exchange(one, other):
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(folders, "_exchange", exchange)
    monkeypatch.setattr(os, "rename", rename)
    monkeypatch.setattr(folders, "_is_mount_point", lambda folder: how == "volume")
    for text in ("one", "two"):
        inode = target.stat().st_ino
        replace(target, text)
        assert contents(target) == sorted(["lost+found", "mark", text])
        assert target.stat().st_ino == inode
    # a process killed while it moved them
    (target / "mark").unlink()
    (target / ".eepass.abcdefgh.old").mkdir()
    replace(target, "three")
    assert contents(tmp_path) == ["volume"]
    assert contents(target) == ["lost+found", "mark", "three"]


def test_contents_come_back_if_they_cannot_all_be_moved(tmp_path, monkeypatch):
    target = tmp_path / "volume"
    replace(target, "one")
    real = os.rename

    def rename(source, destination):
        if Path(destination) == target / "two":
            raise OSError(28, "No space left on device")
        real(source, destination)

    monkeypatch.setattr(folders, "_is_mount_point", lambda folder: True)
    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(OSError, match="No space"):
        replace(target, "two")
    assert contents(target) == ["mark", "one"] and (target / "mark").read_text() == "one"


@pytest.mark.skipif(
    shutil.which("unshare") is None or os.geteuid() != 0, reason="only root may mount here"
)
@pytest.mark.parametrize("mount", ("-t tmpfs none", "--bind bound"), ids=("volume", "bound"))
def test_a_real_mount(tmp_path, mount):
    program = (
        "from pathlib import Path; from eepass.folders import *\n"
        "for text in ('one', 'two'):\n"
        "    with replacing_folder(Path('out').resolve(), lambda f: True) as scratch:\n"
        "        (scratch / text).touch()\n"
    )
    (tmp_path / "program.py").write_text(program)
    (tmp_path / "out").mkdir()
    (tmp_path / "bound").mkdir()
    script = f"mount {mount} out && '{sys.executable}' program.py && ls -A out"
    done = subprocess.run(
        ["unshare", "--mount", "bash", "-c", script], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False,
    )  # fmt: skip
    if "mount" in done.stderr:
        pytest.skip(done.stderr)
    assert done.stdout.split() == ["two"], done.stderr


def test_scratch_of_files_put_in_one_by_one_is_removed(tmp_path):
    with scratch_folder(tmp_path) as scratch:
        assert scratch.parent == tmp_path
        with pytest.raises(InputError, match="another process"), scratch_folder(tmp_path):
            pass
    assert contents(tmp_path) == []


def test_a_file_keeps_owner_and_mode_and_a_link_its_target(tmp_path):
    real, link = tmp_path / "real.json", tmp_path / "link.json"
    real.write_text("old")
    real.chmod(0o640)
    link.symlink_to("real.json")
    write_text_atomically(link, "new")
    assert link.is_symlink() and real.read_text() == "new"
    assert real.stat().st_mode & 0o777 == 0o640
    (tmp_path / "ahead").symlink_to(tmp_path / "to be")
    write_text_atomically(tmp_path / "ahead", "new")
    assert (tmp_path / "to be").read_text() == "new"
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="symbolic links"):
        write_text_atomically(tmp_path / "loop", "new")
    assert contents(tmp_path) == ["ahead", "link.json", "loop", "real.json", "to be"]


def test_what_is_no_plain_file_is_written_through(tmp_path):
    pipe, null = tmp_path / "pipe", tmp_path / "null"
    os.mkfifo(pipe)
    null.symlink_to("/dev/null")
    reader = subprocess.Popen(["cat", pipe], stdout=subprocess.PIPE, text=True)
    write_text_atomically(pipe, "through")
    assert reader.communicate(timeout=60)[0] == "through"
    write_text_atomically(null, "nothing")
    assert pipe.is_fifo() and null.is_symlink() and Path("/dev/null").is_char_device()
    # an open stream, though it has a file's name
    program = (
        "import sys; from pathlib import Path; from eepass.files import write_text_atomically\n"
        "print('before', flush=True); write_text_atomically(Path('/dev/stdout'), 'after')\n"
    )
    with (tmp_path / "out").open("w") as out:
        subprocess.run([sys.executable, "-c", program], cwd=ROOT, stdout=out, check=True)
    assert (tmp_path / "out").read_text() == "before\nafter"
