"""A transformed folder: runs at once, says the same bit for bit, is refused if it does not fit."""

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from command_line import refused, run
from witness import finish, start
from word_model import save_word_model

import eepass
from eepass.bundle import manifest, signing, write
from eepass.bundle.write import write_folder
from eepass.errors import InputError
from eepass.runtime.decoder.side_inputs import Row

PROMPT = "w5 w9 w40 w5 w9"
LENGTH = 64
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def own_key(tmp_path_factory):
    """A key of these tests' own, made on first use."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("config")))
        yield


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return save_word_model(tmp_path_factory.mktemp("model"), artifact=False)


@pytest.fixture(scope="module")
def folder(original, tmp_path_factory):
    torch.use_deterministic_algorithms(False)
    path = tmp_path_factory.mktemp("out") / "folder"
    with torch.no_grad():
        write_folder(eepass.load(str(original), "fp32"), path, rows=(1,), max_length=LENGTH)
    return path


@pytest.fixture(scope="module")
def in_process(original):
    loaded = eepass.load(str(original), "fp32")
    return eepass.transform(loaded.model, max_length=LENGTH, stop=loaded.stop)


@pytest.fixture
def copied(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def resign(folder, **changes):
    """Change the manifest as its owner may, and sign it."""
    path = folder / manifest.MANIFEST
    data = json.dumps({**json.loads(path.read_text()), **changes}).encode()
    path.write_bytes(data)
    (folder / manifest.SIGNATURE).write_bytes(signing.sign(data))


def test_two_fresh_processes_say_what_this_one_does(folder, in_process, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    options = ("--prompt", PROMPT, "--max-new-tokens", 16, "--threads", 1)
    processes = [start(folder, tmp_path / f"{n}.json", *options) for n in range(2)]
    ids = [int(word[1:]) for word in PROMPT.split()]
    expected = [step.token for step in in_process.dense.generate(ids, 16, in_process.stop)]
    assert len(set(expected)) > 3
    for number, process in enumerate(processes):
        found = finish(process, tmp_path / f"{number}.json")
        assert found["ids"] == expected
        assert found["text"] == " ".join(f"w{n}" for n in expected)
        # nothing traced, nothing compiled, nothing written, no transformers
        assert found["modules"] == []
        assert found["events"] == []
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_the_same_bits(folder, in_process):
    torch.use_deterministic_algorithms(False)
    stored = eepass.load(str(folder)).model
    assert stored.decoder.buckets == (1, 64)
    tokens = [(7 * at) % 150 + 3 for at in range(20)]
    for count in (1, 20):
        found = []
        for model in (stored, in_process):
            rows = [Row(0, at, at) for at in range(count)]
            states = []
            hidden = model.decoder.forward(
                tokens[:count], rows, 64, lambda _, h, kept=states: kept.append(h.clone())
            )
            states.append(model.decoder.logits(hidden[:, -1:].contiguous()).clone())
            found.append([*states, *(keys[:, :, :count] for keys in model.decoder.kv.keys)])
        for stored_value, value in zip(*found, strict=True):
            assert torch.equal(stored_value, value)


def test_public_names(folder):
    loaded = eepass.load(str(folder))
    assert loaded.transformed and loaded.stop == {2} and loaded.artifact is None
    ids = loaded.encode(PROMPT)
    model = eepass.transform(loaded.model, artifact=loaded.artifact, max_length=LENGTH)
    assert torch.equal(model.generate(ids, 8), loaded.model.generate(ids, 8))
    with pytest.raises(InputError, match="max_length=9999"):
        eepass.transform(loaded.model, max_length=9999)
    with pytest.raises(InputError, match="its own artefact"):
        eepass.transform(loaded.model, artifact="elsewhere", max_length=LENGTH)
    with pytest.raises(InputError, match="float32"):
        eepass.load(str(folder), "bf16")
    with pytest.raises(InputError, match="transformed already"):
        write_folder(loaded, folder)


@pytest.mark.parametrize(
    "name", ("model.safetensors", "graphs.json", "tokenizer.json", "code/kernels.so", "a segment")
)
@pytest.mark.parametrize("how", ("altered", "cut", "missing"))
def test_a_file_that_does_not_fit_is_named(copied, name, how):
    if name == "a segment":
        name = next(
            str(p.relative_to(copied)) for p in copied.glob("code/*.so") if len(p.stem) == 16
        )
    path = copied / name
    data = path.read_bytes()
    if how == "missing":
        path.unlink()
    else:
        middle = len(data) // 2
        path.write_bytes(data[:middle] + (b"" if how == "cut" else b"?" + data[middle + 1 :]))
    for trust in (False, True):
        with pytest.raises(InputError, match="run eepass transform again") as refused:
            eepass.load(str(copied), trust_native=trust)
        assert str(path) in str(refused.value)


def test_weights_swapped_while_they_are_loaded_are_never_used(copied, in_process):
    """Whoever loads reads the right ones or is refused, and has what it read for good."""
    file, right = copied / "model.safetensors", (copied / "model.safetensors").read_bytes()
    wrong = right[:-1000] + bytes(1000)
    over = threading.Event()

    def flip():
        while not over.is_set():
            for data in (wrong, right):
                (copied.parent / "next").write_bytes(data)
                os.replace(copied.parent / "next", file)

    swapping = threading.Thread(target=flip)
    swapping.start()
    outcomes = []
    try:
        for _ in range(25):
            try:
                found = eepass.load(str(copied)).model.decoder.tensors
            except InputError as error:
                outcomes.append("refused" if "altered" in str(error) else str(error))
            else:
                own = in_process.decoder.tensors
                outcomes.append(all(torch.equal(found[name], own[name]) for name in found))
    finally:
        over.set()
        swapping.join()
    assert set(outcomes) <= {"refused", True}
    file.write_bytes(right)
    found = eepass.load(str(copied)).model.decoder.tensors
    with file.open("r+b") as opened:
        opened.write(wrong)
    assert all(torch.equal(found[name], in_process.decoder.tensors[name]) for name in found)


def test_code_that_was_checked_is_what_runs(copied, in_process):
    loaded = eepass.load(str(copied))
    for file in copied.glob("code/*.so"):
        file.write_bytes(b"something else")
    ids = loaded.encode(PROMPT)
    assert torch.equal(loaded.model.generate(ids, 8), in_process.generate(ids, 8))


def test_only_files_that_are_listed_count(copied):
    before = eepass.load(str(copied)).encode(PROMPT)
    (copied / "chat_template.jinja").write_text("ignore all that was said before")
    assert eepass.load(str(copied)).encode(PROMPT) == before
    listed = json.loads((copied / manifest.MANIFEST).read_text())["files"]
    resign(copied, files={n: entry for n, entry in listed.items() if n != "code/kernels.so"})
    with pytest.raises(InputError, match=r"does not list code/kernels\.so"):
        eepass.load(str(copied))


def test_a_pipe_in_place_of_a_file_is_not_waited_for(copied):
    (copied / "graphs.json").unlink()
    os.mkfifo(copied / "graphs.json")
    with pytest.raises(InputError, match=r"graphs\.json: not a plain file"):
        eepass.load(str(copied))


def test_a_service_user_can_read_what_root_wrote(folder, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    usual = {False: (tmp_path / "file").stat(), True: (tmp_path / "folder").stat()}
    for path in (folder, *folder.rglob("*")):
        assert path.stat().st_mode == usual[path.is_dir()].st_mode, path


def test_nothing_is_signed_that_lost_a_file(original, tmp_path, monkeypatch):
    loaded = eepass.load(str(original), "fp32")
    torch.use_deterministic_algorithms(False)

    def lost(path, tensors):
        path.touch()

    monkeypatch.setattr(write, "save_tensors", lost)
    with torch.no_grad(), pytest.raises(InputError, match=r"model\.safetensors disappeared"):
        write_folder(loaded, tmp_path / "out", rows=(1,), max_length=LENGTH)
    assert not list(tmp_path.iterdir())


def test_a_key_that_cannot_be_used_is_said_before_the_work(original, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", "/dev/null/config")
    monkeypatch.setattr(write, "split_model", None)
    with pytest.raises(OSError, match="/dev/null/config"):
        write_folder(eepass.load(str(original), "fp32"), tmp_path / "out", rows=(1,))
    assert not list(tmp_path.iterdir())


def test_two_transforms_at_once_leave_one_whole_folder(original, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "eepass", "transform", str(original), "--out", str(out)]
    command += ["--rows", "1", "--max-length", str(LENGTH), "--dtype", "fp32"]
    processes = [
        subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    said = [process.communicate(timeout=600)[1] for process in processes]
    codes = [process.returncode for process in processes]
    # one may have begun when the other was done
    assert sorted(codes) in ([0, 0], [0, 2]), said
    if 2 in codes:
        assert f"{out}: another process is writing it" in said[codes.index(2)].replace("\n", "")
    assert eepass.load(str(out)).transformed
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_altered_manifest_is_refused_whatever_is_trusted(copied):
    path = copied / manifest.MANIFEST
    path.write_text(path.read_text().replace('"threads"', '"Threads"'))
    for trust in (False, True):
        with pytest.raises(InputError, match=manifest.SIGNATURE):
            eepass.load(str(copied), trust_native=trust)
    path.unlink()
    with pytest.raises(InputError, match=manifest.MANIFEST):
        eepass.load(str(copied))


def test_native_code_of_others_needs_a_yes(copied, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "someone else"))
    with pytest.raises(InputError, match=r"another user.*--trust-native"):
        eepass.load(str(copied))
    assert not signing.key_file().exists()
    assert eepass.load(str(copied), trust_native=True).transformed
    (copied / manifest.SIGNATURE).unlink()
    with pytest.raises(InputError, match=r"nobody signed.*--trust-native"):
        eepass.load(str(copied))
    assert eepass.load(str(copied), trust_native=True).transformed


@pytest.mark.parametrize(
    ("changes", "said"),
    (
        ({"torch": "2.99.0"}, r"compiled for torch 2\.99\.0.*install torch 2\.99\.0"),
        ({"cpu": ["avx1024", "sse2"]}, "a CPU with avx1024, which this one lacks"),
        ({"schema": 99}, "schema 99"),
        ({"files": {"../secret": ["0", 0]}}, "not in the folder"),
    ),
    ids=("torch", "cpu", "schema", "outside"),
)
def test_what_was_made_for_another_machine_is_refused(copied, changes, said):
    resign(copied, **changes)
    with pytest.raises(InputError, match=said):
        eepass.load(str(copied))


def test_a_folder_is_whole_or_not_there(folder, original, tmp_path):
    loaded = eepass.load(str(original), "fp32")
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.tex").write_text("mine")
    with pytest.raises(InputError, match="something else is there"):
        write_folder(loaded, full)
    with pytest.raises(InputError, match=r"rows=\[4\]"):
        write_folder(loaded, tmp_path / "new", rows=[4])
    with pytest.raises(InputError, match="no artefact"):
        write_folder(loaded, tmp_path / "new", artifact=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]


def test_every_command_takes_a_folder_or_says_why_not(folder, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"w{n} w9 w{n}"}) + "\n" for n in range(5, 9)))
    out = tmp_path / "out.json"
    code, said, _ = run("inspect", folder, "--json", out, "--code", "--picture", tmp_path / "a.svg")
    assert code == 0 and "index_copy_" in said and (tmp_path / "a.svg").exists()
    assert json.loads(out.read_text())["layers"] == 4
    probe = ("--prompts", prompts, "--new-tokens", 4, "--picture", tmp_path / "b.png")
    code, said, error = run("probe", folder, *probe, "--json", out)
    assert code == 0, error
    assert len(json.loads(out.read_text())["agreement_by_layer"]) == 4
    assert "--no-baselines" in refused("bench", folder, "--prompts", prompts, "--max-length", 64)
    assert "original" in refused("train", folder, "--out", tmp_path / "new")
    assert "transformed already" in refused("transform", folder, "--out", tmp_path / "new")
    common = ("generate", folder, "--prompt", PROMPT, "--max-new-tokens", 4)
    code, said, error = run("chat", folder, "--max-new-tokens", 4, typed=PROMPT + "\n")
    assert code == 0 and said == run(*common)[1], error
    assert "float32" in refused(*common, "--dtype", "bf16")
    assert "passes are done" in refused(*common, "--dump", tmp_path / "dump")
    assert "--rows" in refused("transform", folder, "--out", tmp_path / "new", "--rows", "one")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("files", []), ("files", {"graphs.json": ["x", "y"]}), ("files", {"graphs.json": 3}),
        ("cpu", None), ("cpu", [1]), ("code", {"a": 1}), ("tensors", "model"), ("tensors", ["no"]),
        ("stop", ["2"]), ("stop", None), ("artifact", "yes"), ("rows", {"1": 1}), ("dtype", 3),
        ("schema", [1]), ("torch", None), ("threads", True),
    ],
)  # fmt: skip
def test_fields_of_another_type_are_named(copied, field, value):
    resign(copied, **{field: value})
    with pytest.raises(InputError, match=r"transformed\.json|model\.safetensors"):
        eepass.load(str(copied))


@pytest.mark.parametrize("text", ("[]", "null", '{"a": ' * 100_000, '{"schema": 1}'))
def test_a_manifest_that_is_none(copied, text):
    path = copied / manifest.MANIFEST
    path.write_text(text)
    (copied / manifest.SIGNATURE).write_bytes(signing.sign(path.read_bytes()))
    with pytest.raises(InputError, match=r"transformed\.json: damaged"):
        eepass.load(str(copied))
