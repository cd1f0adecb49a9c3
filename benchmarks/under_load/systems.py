"""How each system is started: eepass in three ways, llama.cpp, vLLM."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import eepass
from benchmarks.under_load.servers import PORT, ROOT, System
from eepass.checkpoints.models import gguf_of
from eepass.errors import InputError

EEPASS, LLAMA, VLLM = "eepass", "llama.cpp", "vllm"
DENSE, ONE = "eepass dense", "eepass one after another"
OTHERS = (LLAMA, VLLM)
# what the others are compared with
REFERENCES = (ONE, DENSE, *OTHERS)
# whose answers must be the same; the last is what they are compared with
EXACT = (EEPASS, DENSE, ONE)
# tokens of prompt and answer that others give each request room for
LENGTH = 1024
# requests that others decode together, at least
TOGETHER = 16
# vLLM takes a share of the machine for its cache unless told; GB
VLLM_CACHE = {"VLLM_CPU_KVCACHE_SPACE": "2"}


def all_systems(options: argparse.Namespace, folder: Path) -> dict[str, System]:
    """Those that ``options`` ask for, by name; ``folder``: for files that one of them needs."""
    found = [*eepass_systems(options)]
    if LLAMA in options.beside:
        found.append(llama_server(options) if options.llama_server else llama_python(options))
    if VLLM in options.beside:
        found.append(vllm(options, folder))
    systems = {system.name: system for system in (*found, *map(System.parse, options.server))}
    names = options.only or list(systems)
    if unknown := [name for name in names if name not in systems]:
        raise InputError(f"--only {unknown[0]}: there are {', '.join(systems)}")
    return {name: systems[name] for name in names}


def eepass_systems(options: argparse.Namespace) -> list[System]:
    command = [sys.executable, "-m", "eepass", "serve", options.model, "--port", PORT]
    command += ["--threads", str(options.threads), "--quantize", options.quantize]
    if options.artifact is not None:
        command += ["--artifact", str(options.artifact)]
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return [
        System(name, [*command, *more], environment={"PYTHONPATH": paths})
        for name, more in ((EEPASS, []), (DENSE, ["--dense"]), (ONE, ["--at-once", "1"]))
    ]


def llama_python(options: argparse.Namespace) -> System:
    """llama-cpp-python's server, which answers one request after another."""
    command = [
        options.llama, "-m", "llama_cpp.server", "--model", str(llama_file(options)),
        "--host", "127.0.0.1", "--port", PORT, "--n_ctx", str(LENGTH),
        "--n_threads", str(options.threads), "--n_threads_batch", str(options.threads),
        # else a new request ends the one that is being answered
        "--interrupt_requests", "False", "--model_alias", LLAMA,
    ]  # fmt: skip
    return System(LLAMA, command, {"repeat_penalty": 1.0})


def llama_server(options: argparse.Namespace) -> System:
    """llama.cpp's own server, with continuous batching."""
    together = max(TOGETHER, *options.clients)
    command = [
        str(options.llama_server), "--model", str(llama_file(options)),
        "--host", "127.0.0.1", "--port", PORT, "--alias", LLAMA,
        "--ctx-size", str(LENGTH * together), "--parallel", str(together),
        "--threads", str(options.threads), "--threads-batch", str(options.threads),
    ]  # fmt: skip
    return System(LLAMA, command)


def llama_file(options: argparse.Namespace) -> Path:
    return options.llama_model or gguf_of(options.model)


def vllm(options: argparse.Namespace, folder: Path) -> System:
    """vLLM reads a Hugging Face folder: one is written where the model is none."""
    if options.vllm is None:
        raise InputError("--with vllm needs --vllm PYTHON: the interpreter it is installed for")
    model = options.model
    if not (Path(model) / "config.json").exists():
        loaded = eepass.load(model)
        model = str(folder / "model")
        loaded.model.save_pretrained(model)
        loaded.tokenizer.save_pretrained(model)
    command = [
        options.vllm, "-m", "vllm.entrypoints.openai.api_server", "--model", model,
        "--served-model-name", VLLM, "--host", "127.0.0.1", "--port", PORT,
        "--dtype", "bfloat16", "--max-model-len", str(LENGTH),
        # no penalties that the model recommends
        "--generation-config", "vllm",
        "--max-num-seqs", str(max(TOGETHER, *options.clients)),
    ]  # fmt: skip
    return System(VLLM, command, environment=VLLM_CACHE)


def versions(systems: dict[str, System], options: argparse.Namespace) -> dict[str, str]:
    """Of eepass and of the others that are measured."""
    found = {EEPASS: eepass.__version__}
    ask = "import sys; from importlib.metadata import version; print(version(sys.argv[1]))"
    commands = {
        LLAMA: [options.llama, "-c", ask, "llama-cpp-python"],
        VLLM: [options.vllm, "-c", ask, "vllm-cpu"],
    }
    if options.llama_server:
        commands[LLAMA] = [str(options.llama_server), "--version"]
    for name in OTHERS:
        if name in systems and name in options.beside:
            ran = subprocess.run(commands[name], capture_output=True, text=True, check=False)
            lines = (ran.stdout + ran.stderr).strip().splitlines()
            found[name] = next((line for line in lines if "version" in line), lines[-1])
    return found
