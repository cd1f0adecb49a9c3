"""Which kernels are built for a processor, and which of them go together in a process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from eepass.codegen.cpu import building, native
from eepass.codegen.cpu.building import KernelsMissing, build_kernels

AVX2 = ["avx2", "fma", "f16c"]
AVX512 = [*AVX2, "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"]


@pytest.mark.parametrize(
    ("flags", "used"),
    [
        ([], set()),
        (AVX2, {"packed_avx2", "rows_avx2"}),
        ([*AVX2, "avx_vnni"], {"packed_avxvnni", "rows_avx2"}),
        (AVX512, {"packed_avx512", "rows_avx512"}),
        ([*AVX512, "avx512_bf16"], {"packed_avx512", "rows_avx512bf16"}),
    ],
)
def test_sources_that_a_processor_uses(monkeypatch, flags, used):
    monkeypatch.setattr(building, "cpu_flags", lambda: flags)
    monkeypatch.setattr(building.platform, "machine", lambda: "x86_64")
    anywhere = {s.stem for s in building.SOURCES if not building.flags_of(s)}
    assert {s.stem for s in building.sources(every=False)} == anywhere | used
    assert len(building.sources(every=True)) == len(building.SOURCES)


def test_kernels_of_the_same_sources_go_together_and_others_do_not(monkeypatch, tmp_path):
    data = build_kernels().read_bytes()
    assert native.load_kernels() == ""
    own = tmp_path / "own.so"
    # another file of the same sources is not loaded: this one could not be
    own.write_bytes(b"no library " + data[data.find(building.MARK.encode()) :][:64])
    native.open_kernels(own)
    for other in (b"no library", b"no library " + building.MARK.encode() + b"others\0"):
        own.write_bytes(other)
        with pytest.raises(KernelsMissing, match="other kernels"):
            native.open_kernels(own)


CODE = """
import eepass, torch
from eepass.checkpoints.models import LoadedModel
from eepass.codegen.cpu import building, native
from models import tiny_model, tiny_tokenizer

def whole():
    return building.library_of(building.find_compiler(), True).exists()

best = native.kernel_isa()
assert best and not whole()
try:
    native.kernel_isa("avx2")
    assert best == "avx2"
except building.KernelsMissing:
    pass
with torch.no_grad():
    loaded = LoadedModel("tiny", tiny_model(), tiny_tokenizer(), None)
    model = eepass.transform(loaded.model, max_length=64, stop=loaded.stop)
    expected = model.generate([[5, 6, 7]], max_new_tokens=8)[0].tolist()
    eepass.write_folder(loaded, "folder", rows=(1, 4), max_length=64)
    assert whole()
    again = eepass.load("folder").model.generate([[5, 6, 7]], max_new_tokens=8)[0].tolist()
    assert again == expected
"""


@pytest.mark.slow
def test_a_process_with_kernels_for_its_processor_alone(tmp_path):
    """It decodes, writes a folder for any processor and loads it; another instruction set is
    refused."""
    tests = Path(__file__).parents[1]
    environment = {
        **os.environ,
        "XDG_CACHE_HOME": str(tmp_path),
        "PYTHONPATH": os.pathsep.join((str(tests), str(tests.parent))),
    }
    done = subprocess.run(
        [sys.executable, "-c", CODE], env=environment, cwd=tmp_path, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
