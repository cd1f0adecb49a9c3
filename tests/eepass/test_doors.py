"""Whatever is given at a door is used or refused in one line: soon, in little memory, unchanged."""

import json
import os
import random
import shutil

import pytest
import torch
from command_line import run
from foreign_heads import HIDDEN, foreign_config, foreign_tensors, write_head
from fuzzing import OTHER, bounded, damage_file, digests
from gguf_files import write
from models import VOCABULARY, random_artifact, tiny_model, tiny_tokenizer

import eepass
from eepass.bundle.listed_files import ListedFiles
from eepass.bundle.manifest import read_manifest, write_manifest
from eepass.checkpoints.artifact import load_artifact
from eepass.checkpoints.draft_checks import refuse_bad_draft_head
from eepass.drafts.read_head import Target, read_head
from eepass.errors import InputError
from eepass.training.corpus import GIVEN, Prompt, read_answers, read_prompts

# `make fuzz` asks for more
CASES = int(os.environ.get("FUZZ_CASES", "200"))
SEEDS = range(int(os.environ.get("FUZZ_SEEDS", "2")))


@pytest.fixture(scope="module", autouse=True)
def own_places(tmp_path_factory):
    from eepass.checkpoints import models

    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(home / "config"))
        patch.setattr(models, "cache_dir", lambda: home / "cache")
        yield


def artefact(folder):
    random_artifact(tiny_model("llama")).save(folder)


def checkpoint(folder):
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def gguf(folder):
    folder.mkdir()
    write(folder / "tiny.gguf", kinds=(("ffn_down", "Q8_0"),))


def prompts(folder):
    folder.mkdir()
    texts = [json.dumps({"prompt": f"w{n}"}) for n in range(9)] + ['{"turns": ["w5", "w6"]}']
    (folder / "prompts.jsonl").write_text("\n".join(texts))


def answers(folder):
    folder.mkdir()
    lines = [json.dumps({"prompt": n, "answer": [n, 7, 8]}) for n in range(10)]
    (folder / "answers.jsonl").write_text("\n".join(lines))


def draft_head(folder):
    config = foreign_config(fc_norm=True)
    write_head(folder, config, foreign_tensors(config))


def read_draft_head(folder):
    weight = torch.ones(VOCABULARY, HIDDEN)
    refuse_bad_draft_head(
        read_head(folder, Target(4, HIDDEN, VOCABULARY, weight, weight, None))[0],
        HIDDEN, 4, VOCABULARY,
    )  # fmt: skip


def transformed(folder):
    folder.mkdir()
    (folder / "graphs.json").write_text('{"graphs": {}, "splits": [], "exits": {}}')
    write_manifest(
        folder, ("graphs.json",), name="x", eepass="0", threads=1, fingerprint={}, dtype="float32",
        max_length=64, rows=[1], stop=[2], artifact=False, code={"a": "b"}, tensors=["t"],
    )  # fmt: skip


def check_listed(folder):
    files = ListedFiles(folder, read_manifest(folder, trust_native=True).files)
    for name in files.listed:
        files.check(name)


PROMPTS = [Prompt([n], GIVEN, "fit") for n in range(10)]
DOORS = {
    "artefact": (artefact, load_artifact),
    "load": (checkpoint, lambda folder: eepass.load(str(folder))),
    "gguf": (gguf, lambda folder: eepass.load(str(folder / "tiny.gguf"))),
    "prompts": (prompts, lambda folder: read_prompts(folder / "prompts.jsonl")),
    "answers": (answers, lambda f: read_answers(f / "answers.jsonl", PROMPTS, 99)),
    "folder": (transformed, check_listed),
    "draft head": (draft_head, read_draft_head),
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("door", DOORS)
def test_damaged_files(door, seed, tmp_path):
    make, read = DOORS[door]
    make(tmp_path / "whole")
    read(tmp_path / "whole")
    chance = random.Random(f"{door} {seed}")
    outcomes = {"used": 0, "refused": 0}
    for case in range(CASES):
        folder = tmp_path / "damaged"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "whole", folder)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        damage_file(chance.choice(files), chance)
        (folder / "transformed.sig").unlink(missing_ok=True)
        before, outcome = digests(folder), "used"
        try:
            with bounded():
                read(folder)
        except InputError as error:
            outcome = "refused"
            assert str(error) and "\n" not in str(error), f"case {case}: {error}"
        outcomes[outcome] += 1
        assert digests(folder) == before
    assert outcomes["refused"] > CASES / 10, outcomes


COMMANDS = {
    "generate": ("--prompt", "--max-new-tokens", "--preset", "--kv", "--temperature", "--top-p",
                 "--seed", "--dtype", "--quantize", "--activations", "--artifact", "--speculate"),
    "chat": ("--system", "--max-new-tokens", "--max-length", "--preset", "--temperature", "--dtype",
             "--min-p", "--seed", "--quantize"),
    "train": ("--prompts", "--answers", "--tokens", "--samples", "--draft", "--steps", "--dtype"),
    "transform": ("--rows", "--max-length", "--quantize", "--artifact", "--dtype"),
    "export-draft": ("--format", "--artifact", "--verifier", "--dtype"),
    "inspect": ("--preset", "--target-agreement", "--artifact", "--dtype", "--activations"),
}  # fmt: skip


WRITING = ("train", "transform", "export-draft")


@pytest.mark.parametrize("seed", SEEDS)
def test_command_lines(seed, tmp_path, monkeypatch):
    """Options of any value, and models that are none; nothing is written."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    chance, before = random.Random(seed), sorted(tmp_path.rglob("*"))
    values = [*map(str, OTHER), "\udcff", "/dev/null", "empty", "nothing", "x" * 5000, "0", "1"]
    for case in range(CASES):
        name = chance.choice(list(COMMANDS))
        # no model, so what is not refused by its value is refused by this
        arguments = [name, chance.choice(("empty", "nothing", "a/b/c", "x.gguf", "\udcff"))]
        arguments += ["--prompt", "w5"] if name == "generate" else []
        arguments += ["--out", "out"] if name in WRITING else []
        for option in chance.sample(COMMANDS[name], chance.randint(1, 3)):
            arguments += [option, chance.choice(values)]
        with bounded():
            code, _, said = run(*arguments)
        assert code == 2 and "Traceback" not in said, f"case {case}: {arguments}\n{said}"
        assert sorted(tmp_path.rglob("*")) == before
