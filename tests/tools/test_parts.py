"""A file in parts: whole again, or refused with the part that is wrong."""

import subprocess
import sys
from pathlib import Path

import pytest

from tools.parts import PartsError, check, join, split

ROOT = Path(__file__).parents[2]
DATA = bytes(range(256)) * 40


@pytest.fixture
def folder(tmp_path):
    source = tmp_path / "weights.gguf"
    source.write_bytes(DATA)
    split(source, tmp_path / "parts", megabytes=0.004)
    return tmp_path / "parts"


def test_parts_are_small_and_whole_again(folder, tmp_path):
    manifest = check(folder)
    assert [part["bytes"] for part in manifest["parts"]] == [4000, 4000, 2240]
    (tmp_path / "weights.gguf").unlink()
    file = join(folder, tmp_path)
    assert file == tmp_path / "weights.gguf" and file.read_bytes() == DATA
    # what is there already is not written again
    before = file.stat().st_mtime_ns
    assert join(folder, tmp_path).stat().st_mtime_ns == before


@pytest.mark.parametrize("damage", ("changed", "short", "missing", "swapped"))
def test_damage_is_named_and_nothing_is_written(folder, tmp_path, damage):
    first, second = (folder / f"weights.gguf.part-0{number}" for number in (1, 2))
    if damage == "changed":
        second.write_bytes(second.read_bytes()[::-1])
    elif damage == "short":
        second.write_bytes(second.read_bytes()[:-1])
    elif damage == "missing":
        second.unlink()
    else:
        one = first.read_bytes()
        first.write_bytes(second.read_bytes())
        second.write_bytes(one)
    with pytest.raises(PartsError, match=r"part-0[12]"):
        join(folder, tmp_path / "again.gguf")
    assert not (tmp_path / "again.gguf").exists()


def test_a_manifest_cannot_name_files_elsewhere(folder):
    manifest = folder / "weights.gguf.parts.json"
    manifest.write_text(manifest.read_text().replace("weights.gguf.part-02", "../secret"))
    with pytest.raises(PartsError, match=r"\.\./secret"):
        check(folder)


def test_the_command(folder, tmp_path):
    def run(*arguments):
        command = [sys.executable, str(ROOT / "tools" / "parts.py"), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)

    assert "3 parts, whole" in run("check", folder).stdout
    (folder / "weights.gguf.part-03").unlink()
    failed = run("join", folder, "--out", tmp_path / "x")
    assert failed.returncode == 2 and "part-03: missing" in failed.stderr
    assert "Traceback" not in failed.stderr
