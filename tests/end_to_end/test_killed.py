"""Killed at any moment, a command leaves what was there as it was, and the next run finishes."""

import json
import multiprocessing
import os
import random
import shutil
import time

import pytest
import torch
from command_line import run_alone
from word_model import save_word_model, write_prompts

import eepass
from eepass.codegen.cpu.building import build_kernels

# fewer for a first look: the kills of one command take minutes
KILLS = int(os.environ.get("KILLS", "25"))
# imported before each process is forked, so that their time goes into the work
IMPORTED = ["eepass.cli.main", "eepass.bundle.write", "eepass.training.train", "transformers"]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_word_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def process(tmp_path_factory):
    """Makes processes that run a command, with a cache and a key of their own."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(home / "config"))
        kernels = build_kernels()
        patch.setenv("XDG_CACHE_HOME", str(home / "cache"))
        (home / "cache" / "eepass").mkdir(parents=True)
        shutil.copy(kernels, home / "cache" / "eepass")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(IMPORTED)
        yield lambda arguments: context.Process(target=run_alone, args=(arguments,))


def work(name, model_folder, tmp_path):
    """A command's arguments and what shows that its outcome works; a value for what it says."""
    out = tmp_path / "out"
    if name == "train":
        prompts = write_prompts(tmp_path / "prompts.jsonl")
        options = ("--prompts", prompts, "--tokens", 9000, "--max-length", 256)
        options += ("--draft", "none")

        def works():
            found = eepass.load_artifact(out)
            return sorted(
                (key, tensor.double().sum().item()) for key, tensor in found.tensors.items()
            )

        return (name, model_folder, "--out", out, "--dtype", "fp32", *options), works
    if name == "transform":

        def works():
            loaded = eepass.load(str(out))
            return loaded.model.generate(loaded.encode("w5 w9"), 6).tolist()

        options = ("--rows", "1", "--max-length", 64, "--dense", "--dtype", "fp32")
        return (name, model_folder, "--out", out, *options), works
    if name == "export-onnx":

        def works():
            from eepass.onnx.runtime import OnnxDecoder

            return [token for token, _ in OnnxDecoder(out / "decode.onnx", 1).stream([5, 9], 6)]

        return (name, model_folder, "--out", out, "--max-length", 64), works
    figures = tmp_path / "figures.json"

    def works():
        return json.loads(figures.read_text())["ids"]

    options = ("--prompt", "w5 w9", "--max-new-tokens", 6, "--dtype", "fp32", "--json", figures)
    return ("generate", model_folder, *options), works


def forget(name, tmp_path):
    """Make the next run do all of its work."""
    if name == "train":
        shutil.rmtree(tmp_path / "out" / "checkpoint", ignore_errors=True)
    if name == "generate":
        shutil.rmtree(kept().folder, ignore_errors=True)


def kept():
    from eepass.kept.splits import kept_entries

    return kept_entries()


def finish(made):
    made.start()
    made.join(600)
    assert made.exitcode == 0


@pytest.mark.parametrize("name", ("train", "transform", "export-onnx", "generate"))
def test_killed_at_any_moment(name, model_folder, process, tmp_path):
    if name == "export-onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    torch.use_deterministic_algorithms(False)
    arguments, works = work(name, model_folder, tmp_path)
    finish(process(arguments))
    forget(name, tmp_path)
    began = time.monotonic()
    finish(process(arguments))
    seconds, before = time.monotonic() - began, works()
    chance, killed = random.Random(name), 0
    for _ in range(KILLS):
        forget(name, tmp_path)
        made = process(arguments)
        began = time.monotonic()
        made.start()
        made.join(chance.uniform(0, seconds))
        if made.exitcode == 0:
            # the machine is less busy than it was
            seconds = min(seconds, time.monotonic() - began)
        made.kill()
        made.join(60)
        killed += made.exitcode == -9
        assert works() == before
        if name == "generate":
            entries = [path.name for path in kept().folder.glob("*-*")]
            assert all(kept().find(entry) for entry in entries if not entry.endswith(".part"))
    assert killed > KILLS // 2
    finish(process(arguments))
    assert works() == before
    left = [path.name for path in tmp_path.rglob(".*")]
    assert not left


def test_a_training_killed_again_and_again_gets_done(model_folder, process, tmp_path):
    arguments, works = work("train", model_folder, tmp_path)
    chance, runs = random.Random(1), 0
    while not (tmp_path / "out" / "eepass.json").exists():
        runs += 1
        made = process(arguments)
        made.start()
        # each run has a little longer: none is killed for ever
        made.join(chance.uniform(0, 1 + runs))
        made.kill()
        made.join(60)
    finish(process(arguments))
    assert works() and runs > 1
