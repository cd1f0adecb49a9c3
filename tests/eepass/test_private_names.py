"""What torch and transformers do not document is named in one module."""

import ast
from pathlib import Path

import pytest
import torch

from eepass import private_names
from eepass.errors import InputError

ROOT = Path(__file__).parents[2]
FOLDERS = ("eepass", "passes", "codegen", "runtime")
# modules of transformers that its documentation describes
DOCUMENTED = {"transformers", "transformers.utils", "transformers.generation"}


def _foreign(source: Path) -> set[str]:
    """Private names of torch, and modules of transformers, that a file reads."""
    found = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Attribute):
            found.add(ast.unparse(node))
    return {name for name in found if _is_private(name)}


def _is_private(name: str) -> bool:
    home, *inner = name.split(".")
    if not all(map(str.isidentifier, (home, *inner))):
        return False
    if home == "torch":
        return any(part.startswith("_") and not part.startswith("__") for part in inner)
    return home == "transformers" and name.rpartition(".")[0] not in DOCUMENTED | {""}


def test_no_other_module_reads_them():
    for folder in FOLDERS:
        for source in (ROOT / folder).rglob("*.py"):
            if source.name != "private_names.py":
                assert not _foreign(source), source.relative_to(ROOT)


def test_a_private_name_is_recognised(tmp_path):
    source = tmp_path / "reads.py"
    source.write_text(
        "from torch._inductor import config\n"
        "from transformers import AutoConfig\n"
        "from transformers.cache_utils import StaticLayer\n"
        "torch._dynamo.reset(), torch.__version__\n"
    )
    assert _foreign(source) == {
        "torch._inductor.config", "transformers.cache_utils.StaticLayer", "torch._dynamo.reset",
        "torch._dynamo",
    }  # fmt: skip


@pytest.mark.parametrize("name", sorted(private_names.PLACES))
def test_installed_versions_have_it(name):
    if name in private_names.CUDA and torch.version.cuda is None:
        pytest.skip("torch is built without CUDA")
    found = getattr(private_names, name)
    assert (found is None) == (name in private_names.SINCE and not _is_there(name))


def _is_there(name: str) -> bool:
    import transformers

    return tuple(map(int, transformers.__version__.split(".")[:2])) >= private_names.SINCE[name]


def test_a_release_without_one_is_named(monkeypatch):
    monkeypatch.setitem(private_names.PLACES, "gone", "torch._guards:gone")
    with pytest.raises(InputError, match=r"^torch \S+ has no torch._guards.gone, which"):
        getattr(private_names, "gone")  # noqa: B009


def test_a_later_name_is_none_before_its_version(monkeypatch):
    monkeypatch.setitem(private_names.PLACES, "coming", "torch._guards:coming")
    monkeypatch.setitem(private_names.SINCE, "coming", (99, 0))
    assert private_names.__getattr__("coming") is None
