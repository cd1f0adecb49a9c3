"""Compiled kernels: arguments as the driver reads them, and folders that do not fit refused."""

import ctypes
import json
import struct
import sys
from types import SimpleNamespace

import pytest

from eepass.codegen.cuda import driver
from eepass.codegen.cuda.stored_kernels import (
    KernelsUnfit,
    best_folder,
    read_kernels,
    runs_on,
    write_kernels,
)

SOURCES = {"_exit_kernel": "abc", "_gate_kernel": "def"}


def kernel(name="_exit_kernel", key="k1", code=b"\x7fELF code"):
    return SimpleNamespace(
        key=key, name=name, code=code, parameters=("u64", "u32"), shared_bytes=256, warps=4
    )


@pytest.fixture
def folder(tmp_path):
    write_kernels(tmp_path, 80, [kernel(), kernel("_gate_kernel", "k2")], SOURCES, {"rows": 1})
    return tmp_path


def test_arguments_lie_as_the_driver_reads_them():
    types = ("u64", "u32", "s32", "f32", "u64")
    parameters = driver.Parameters(types, (2**40 + 3, 7, -2, 0.5, 0))
    values = (2**40 + 3, 7, -2, 0.5, 0)
    expected = [struct.pack(form, v) for form, v in zip("QIifQ", values, strict=True)]
    assert parameters.packed() == expected
    # what the driver is handed: an array of pointers to those bytes
    table = (ctypes.c_void_p * 5).from_address(parameters.address)
    assert [ctypes.string_at(p, len(e)) for p, e in zip(table, expected, strict=True)] == expected
    with pytest.raises(ValueError, match="2 arguments for 1 parameters"):
        driver.Parameters(("u64",), (1, 2))


def test_a_folder_is_read_as_it_was_written(folder):
    capability, found = read_kernels(folder, 86, SOURCES)
    assert capability == 80 and found.keys() == {"k1", "k2"}
    assert found["k1"].name == "_exit_kernel" and found["k1"].parameters == ("u64", "u32")
    assert (found["k1"].warps, found["k1"].shared_bytes) == (4, 256)
    assert found["k2"].code == b"\x7fELF code"
    assert json.loads((folder / "kernels.json").read_text())["rows"] == 1


@pytest.mark.parametrize(
    "compiled, here, fits",
    ((80, 80, True), (80, 86, True), (86, 80, False), (80, 90, False), (90, 90, True),
     (90, 100, False), (100, 103, False), (89, 90, False)),
)  # fmt: skip
def test_code_runs_within_its_generation(compiled, here, fits):
    assert runs_on(compiled, here) == fits


def test_another_gpu_is_refused_by_name(folder):
    with pytest.raises(KernelsUnfit, match=r"for sm_80, this GPU is sm_90.*--target sm_90"):
        read_kernels(folder, 90, SOURCES)


@pytest.mark.parametrize("now", ({**SOURCES, "_exit_kernel": "new"}, {"_gate_kernel": "def"}))
def test_code_of_another_source_is_refused_by_name(folder, now):
    with pytest.raises(KernelsUnfit, match="_exit_kernel has another source than here"):
        read_kernels(folder, 80, now)


def test_damage_is_refused_by_name(folder):
    (folder / "k2.cubin").write_bytes(b"other")
    with pytest.raises(KernelsUnfit, match=r"k2\.cubin: altered"):
        read_kernels(folder, 80, SOURCES)
    (folder / "k2.cubin").unlink()
    with pytest.raises(KernelsUnfit, match=r"k2\.cubin: missing"):
        read_kernels(folder, 80, SOURCES)
    index = folder / "kernels.json"
    for text in ("{", '{"capability": 80}', "[]", '{"capability": 80, "cubins": 3, "sources": 1}'):
        index.write_text(text)
        with pytest.raises(KernelsUnfit, match=r"kernels\.json: damaged"):
            read_kernels(folder, 80, SOURCES)
    index.unlink()
    with pytest.raises(KernelsUnfit, match=r"kernels\.json: missing"):
        read_kernels(folder, 80, SOURCES)


def test_of_several_targets_the_one_that_runs_here(tmp_path):
    for target in ("sm_80", "sm_86", "sm_90"):
        (tmp_path / target).mkdir()
    assert best_folder(tmp_path, 89).name == "sm_86"
    assert best_folder(tmp_path, 80).name == "sm_80"
    with pytest.raises(KernelsUnfit, match=r"sm_100.*but for sm_80, sm_86, sm_90.*--gpu sm_100"):
        best_folder(tmp_path, 100)


def test_what_the_driver_refuses_is_said(monkeypatch):
    class Error:
        name = "CUDA_ERROR_NO_BINARY_FOR_GPU"

        def __int__(self):
            return 209

    with pytest.raises(driver.CudaFailed, match=r"loading _exit_kernel: .*NO_BINARY_FOR_GPU"):
        driver.checked("loading _exit_kernel", (Error(), None))
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(driver.CudaMissing, match=r"pip install 'eepass\[gpu\]'"):
        driver.bindings()


def test_a_launch_reaches_the_driver_as_it_was_packed(monkeypatch):
    calls = []

    class Driver:
        class CUfunction_attribute:
            CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8

        def __getattr__(self, name):
            def call(*arguments):
                calls.append((name, arguments))
                return (0, f"<{name}>")

            return call

    monkeypatch.setattr(driver, "bindings", Driver)
    _, function = driver.load(b"code", "_exit_kernel", ("u64", "u32"), 100_000)
    function.launch((3, 2), 128, 100_000, (4096, 7), 11)
    names = [name for name, _ in calls]
    assert names == [
        "cuModuleLoadData", "cuModuleGetFunction", "cuFuncSetAttribute", "cuLaunchKernel"
    ]  # fmt: skip
    assert calls[2][1] == ("<cuModuleGetFunction>", 8, 100_000)
    assert calls[3][1][:9] == ("<cuModuleGetFunction>", 3, 2, 1, 128, 1, 1, 100_000, 11)
