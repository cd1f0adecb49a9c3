"""Who may import whom: the stages import the vocabulary and themselves, never one another."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
VOCABULARY = {
    "eepass.config",
    "eepass.fused_ops",
    "eepass.into_ops",
    "eepass.ops",
    "eepass.plan",
    "eepass.quantized_ops",
}


def imported_modules(source: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names & VOCABULARY if node.module == "eepass" else {node.module}
            if node.module == "eepass" and not names <= VOCABULARY:
                found.add("eepass")
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name == "eepass" or name.startswith("eepass.")}


@pytest.mark.parametrize("stage", ("passes", "codegen", "runtime"))
def test_a_stage_imports_itself_and_the_vocabulary(stage):
    sources = list((ROOT / stage).rglob("*.py"))
    assert len(sources) > 3
    for source in sources:
        foreign = {
            module
            for module in imported_modules(source) - VOCABULARY
            if not module.startswith(f"eepass.{stage}.")
        }
        assert not foreign, f"{source.relative_to(ROOT)} imports {sorted(foreign)}"


@pytest.mark.parametrize("module", ("config", "ops", "plan"))
def test_the_vocabulary_imports_nothing_of_ours(module):
    assert not imported_modules(ROOT / "eepass" / f"{module}.py")


def test_the_folders_are_one_package():
    for stage in ("passes", "codegen", "runtime"):
        assert (ROOT / "eepass" / stage).resolve() == (ROOT / stage).resolve()
