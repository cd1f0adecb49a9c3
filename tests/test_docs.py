"""The documentation: its Python runs; it builds without a warning and needs nobody else's parts."""

import importlib.util
import json
import re
import runpy
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from models import AsTraced, random_artifact, tiny_model, tiny_tokenizer

import eepass

ROOT = Path(__file__).parents[1]
PYTHON = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = [
    str(path.relative_to(ROOT))
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    if PYTHON.search(path.read_text(encoding="utf-8"))
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder to work in, with what the pages speak of: a model, its artefact, prompts."""
    path = tmp_path_factory.mktemp("book")
    # room for the lengths the pages ask for
    model = tiny_model("llama", num_hidden_layers=2, max_position_embeddings=4096)
    model.generation_config.pad_token_id = 0
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(path / "my-model")
    model.save_pretrained(path / "my-model")
    model = eepass.load(str(path / "my-model")).model
    random_artifact(model).save(path / "DIR")
    texts = ["hello", "how are you", "why is that so", "tell me more", "and then"]
    lines = "".join(json.dumps({"prompt": text}) + "\n" for text in texts)
    (path / "prompts.jsonl").write_text(lines, encoding="utf-8")
    return path


@pytest.mark.parametrize("page", PAGES)
def test_the_python_of_a_page_runs(page, folder, monkeypatch, capsys):
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = PYTHON.findall(text)
    if "import triton" in text:
        pytest.importorskip("triton")
    if "eepass.serve" in text:
        for module in ("starlette", "uvicorn", "prometheus_client"):
            pytest.importorskip(module, reason="the extra 'serve' is not installed")
        from eepass.server.running import Server

        # who waits for a server ends it
        monkeypatch.setattr(Server, "wait", Server.kill_server)
    monkeypatch.chdir(folder)
    monkeypatch.setattr("eepass.early_exit_model._cpu_compiler", AsTraced)
    torch.use_deterministic_algorithms(False)
    # the blocks of a page go on from one another, those of the README are by themselves
    segments = blocks if page == "README.md" else ["\n\n".join(blocks)]
    for number, code in enumerate(segments):
        # as a file: what is compiled looks for its source
        file = folder / f"{Path(page).stem.replace('-', '_')}_{number}.py"
        file.write_text(code.replace('"smollm2"', '"my-model"').replace("port=8000", "port=0"))
        with torch.enable_grad():
            runpy.run_path(str(file), given() if page == "README.md" else None)


def given():
    """What blocks of the README are written in the midst of."""
    from transformers import CompileConfig

    loaded = eepass.load("my-model")
    inputs = loaded.tokenizer("hello", return_tensors="pt")
    given = {"eepass": eepass, "CompileConfig": CompileConfig}
    return {**given, "model": loaded.model, "inputs": inputs}


def test_pages_of_code_are_not_overlooked():
    assert {"README.md", "docs/pass.md", "docs/kernel.md", "docs/draft.md"} <= set(PAGES)
    assert "docs/tutorial.md" in PAGES


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The pages, built as ``make docs`` does."""
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip("the extra 'docs' is not installed")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    path = tmp_path_factory.mktemp("site")
    sys.path.insert(0, str(ROOT))
    config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(path), strict=True)
    config.plugins.on_startup(command="build", dirty=False)
    # raises at the first warning
    build(config)
    config.plugins.on_shutdown()
    return path


def test_the_pages_build_and_ask_nobody_for_parts(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 12
    loads = re.compile(r"<(?:script|link|img|iframe)\b[^>]*?(?:src|href)=[\"']?(?:https?:)?//")
    for page in pages:
        found = loads.findall(page.read_text(encoding="utf-8"))
        assert not found, (page, found)


def test_every_command_and_public_name_has_its_place(site):
    from eepass.cli.main import app

    commands = (site / "cli.html").read_text(encoding="utf-8")
    names = [c.callback.__name__.replace("_", "-") for c in app.registered_commands]
    assert len(names) > 8
    for name in names:
        assert f"<code>eepass {name}</code>" in commands, name
    reference = (site / "api.html").read_text(encoding="utf-8")
    for name in eepass.__all__:
        assert re.search(rf'id="eepass\.(?:\w+\.)*{name}"', reference), name
    # docstrings, and not names alone
    assert "compile_fx" not in reference and "guarantee" in reference


def test_the_version_is_in_one_place_and_has_its_changes():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["dynamic"] == ["version"]
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    # what is merged stands under the version to come, or the one that is there
    assert headings[0] >= eepass.__version__ and eepass.__version__ in headings
    numbers = [tuple(map(int, heading.split("."))) for heading in headings]
    assert numbers == sorted(numbers, reverse=True)
