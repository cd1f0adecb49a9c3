"""Cache entries: whole or not at all, checked when read, bounded, for several processes."""

import os
import subprocess
import sys

import pytest

from eepass.kept.entries import LISTING, Entries, size_of


@pytest.fixture
def entries(tmp_path):
    return Entries(tmp_path / "kept")


def contents(entry):
    return {path.name: path.read_bytes() for path in entry.iterdir() if path.name != LISTING}


def test_what_was_written_is_found_and_the_first_writer_wins(entries):
    assert entries.find("a") is None
    entries.write("a", {"one": b"1", "two": b"22"})
    entries.write("a", {"one": b"other"})
    assert contents(entries.find("a")) == {"one": b"1", "two": b"22"}
    entries.drop("a")
    assert entries.find("a") is None and not list(entries.folder.iterdir())


@pytest.mark.parametrize("damage", ["shorter", "other", "missing", "listing", "escape"])
def test_a_damaged_entry_is_thrown_away(entries, damage):
    entries.write("a", {"code": b"0123456789"})
    file = entries.folder / "a" / "code"
    if damage == "shorter":
        file.write_bytes(b"01234")
    elif damage == "other":
        file.write_bytes(b"0123456780")
    elif damage == "missing":
        file.unlink()
    elif damage == "listing":
        (entries.folder / "a" / LISTING).write_text("{")
    else:
        (entries.folder / "a" / LISTING).write_text('{"../outside": "00"}')
    assert entries.find("a") is None
    assert not (entries.folder / "a").exists()
    entries.write("a", {"code": b"again"})
    assert contents(entries.find("a")) == {"code": b"again"}


@pytest.mark.parametrize("which", ["", "a", "a/code", f"a/{LISTING}"])
def test_what_others_can_write_to_is_not_read(entries, which):
    entries.write("a", {"code": b"1"})
    (entries.folder / which).chmod(0o777)
    assert entries.find("a") is None


def test_a_link_is_not_followed(entries, tmp_path):
    entries.write("a", {"code": b"1"})
    (tmp_path / "elsewhere").write_bytes(b"1")
    (entries.folder / "a" / "code").unlink()
    (entries.folder / "a" / "code").symlink_to(tmp_path / "elsewhere")
    assert entries.find("a") is None


def test_what_was_used_longest_ago_makes_room(tmp_path):
    entries = Entries(tmp_path / "kept", limit=5000)
    for key in "abc":
        entries.write(key, {"code": bytes(1000)})
    for age, key in enumerate("cba"):
        os.utime(entries.folder / key, (1000 + age, 1000 + age))
    assert entries.find("c") is not None
    entries.write("d", {"code": bytes(2500)})
    assert {key for key in "abcd" if entries.find(key)} == {"a", "c", "d"}
    assert size_of(entries.folder) <= entries.limit


def test_what_is_written_after_answers_looks_at_no_other_entry(entries, monkeypatch):
    looked = []
    monkeypatch.setattr("eepass.kept.entries.size_of", lambda folder: looked.append(folder) or 0)
    for text in (b"first", b"second"):
        entries.replace("key", {"file": text})
        assert (entries.find("key") / "file").read_bytes() == text
    assert not looked
    entries.write("other", {"file": b"third"})
    assert looked


def test_a_folder_that_cannot_be_written_is_an_empty_cache(tmp_path):
    (tmp_path / "file").write_text("")
    entries = Entries(tmp_path / "file" / "kept")
    entries.write("a", {"code": b"1"})
    entries.drop("a")
    assert entries.find("a") is None


WRITER = """
import sys
from pathlib import Path
from eepass.kept.entries import Entries
entries = Entries(Path(sys.argv[1]), limit=40_000)
for turn in range(150):
    key = f"k{turn % 7}"
    found = entries.find(key)
    if found is None:
        entries.write(key, {"code": key.encode() * 1000})
    else:
        try:
            assert (found / "code").read_bytes() == key.encode() * 1000
        except FileNotFoundError:
            pass
    if turn % 5 == 0:
        entries.drop(key)
"""


def test_two_processes_may_write_and_drop_at_a_time(tmp_path):
    command = [sys.executable, "-c", WRITER, str(tmp_path / "kept")]
    both = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in both:
        assert process.wait() == 0, process.stderr.read()
    left = Entries(tmp_path / "kept")
    assert all(left.find(path.name) for path in left.folder.iterdir())
