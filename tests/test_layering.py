"""Who may import whom: wings import what is listed for them, and no module is in a circle."""

import ast
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).parents[1]
STAGES = ("passes", "codegen", "runtime")
# the words all stages share; they import one another alone
VOCABULARY = {
    "config", "errors", "exit_rule", "kernel_forms", "masks", "ops", "plan", "private_names",
    "reading", "segments",
}  # fmt: skip
# by wing, what it may import besides itself and the vocabulary; files of eepass/ itself are wings
MAY_IMPORT = {
    "passes": set(),
    "codegen": set(),
    "runtime": set(),
    "files": set(),
    "folders": set(),
    "stored_graphs": set(),
    "model_stamp": set(),
    "wrappers": set(),
    "kept": {"codegen", "model_stamp", "passes", "stored_graphs"},
    "pictures": set(),
    "lengths": {"passes"},
    "checkpoints": {"codegen", "files", "folders"},
    "planning": {"checkpoints"},
    "executors": {"kept", "passes", "planning", "runtime"},
    "long": {"codegen", "passes", "runtime"},
    "early_exit_model": {
        "checkpoints", "codegen", "executors", "kept", "long", "passes", "planning", "runtime",
    },
    "draft_models": {"early_exit_model", "executors", "runtime"},
    "model": {
        "checkpoints", "codegen", "draft_models", "early_exit_model", "executors", "kept",
        "lengths", "passes", "planning", "runtime", "wrappers",
    },
    "conversation": {"checkpoints", "model", "runtime"},
    "inspecting": {"model", "passes", "planning"},
    "bundle": {
        "checkpoints", "codegen", "files", "folders", "inspecting", "model", "passes", "pictures",
        "planning", "runtime", "stored_graphs",
    },
    "loading": {"bundle", "checkpoints"},
    "hf": {"checkpoints", "lengths", "model", "model_stamp", "runtime", "wrappers"},
    "server": {
        "checkpoints", "early_exit_model", "hf", "lengths", "model", "runtime", "wrappers",
    },
    "torch_compile": {
        "checkpoints", "codegen", "model", "model_stamp", "passes", "planning", "runtime",
        "wrappers",
    },
    "onnx": {"checkpoints", "folders", "model", "passes", "planning", "runtime"},
    "training": {
        "checkpoints", "codegen", "files", "folders", "lengths", "model", "passes", "runtime",
    },
    "benchmark": {
        "checkpoints", "codegen", "lengths", "model", "passes", "runtime", "training",
    },
    "drafts": {"checkpoints", "files", "folders", "model", "runtime", "training"},
    "exactness": {"checkpoints", "codegen", "model", "runtime"},
    "doctoring": {"checkpoints", "codegen", "kept", "runtime"},
    "cli": {
        "benchmark", "bundle", "checkpoints", "codegen", "conversation", "doctoring", "drafts",
        "exactness", "files", "inspecting", "lengths", "long", "model", "onnx", "pictures",
        "runtime", "server", "training",
    },
    "__main__": {"cli"},
}  # fmt: skip


def modules() -> dict[str, Path]:
    """Every module of the package by name; the stages' files lie in folders of their own."""
    found = {}
    for top in ("eepass", *STAGES):
        package = "eepass" if top == "eepass" else f"eepass.{top}"
        for source in (ROOT / top).rglob("*.py"):
            parts = source.relative_to(ROOT / top).with_suffix("").parts
            if top == "eepass" and parts[0] in STAGES:
                continue
            found[".".join([package, *(p for p in parts if p != "__init__")])] = source
    return found


MODULES = modules()


def imported(source: Path) -> set[str]:
    """Modules of ours that a file imports, wherever in it; not those for type checkers alone."""
    found: set[str] = set()
    waiting: list[ast.AST] = [ast.parse(source.read_text())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            waiting += node.orelse
            continue
        waiting += ast.iter_child_nodes(node)
        if isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in inner}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & set(MODULES)


def wing_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


@pytest.mark.parametrize("wing", sorted({wing_of(m) for m in MODULES} - {""}))
def test_a_wing_imports_what_is_listed(wing):
    allowed = {wing} | VOCABULARY
    if wing not in VOCABULARY:
        # eepass/__init__.py holds the version and imports nothing before it is asked
        allowed |= MAY_IMPORT[wing] | {""}
    for module, source in MODULES.items():
        if wing_of(module) == wing:
            foreign = {name for name in imported(source) if wing_of(name) not in allowed}
            assert not foreign, f"{module} imports {sorted(foreign)}"


def test_no_module_is_in_an_import_circle():
    graph = nx.DiGraph(
        (module, name) for module, source in MODULES.items() for name in imported(source)
    )
    circles = [sorted(c) for c in nx.strongly_connected_components(graph) if len(c) > 1]
    assert not circles, circles


def test_no_module_carries_the_name_of_a_public_function():
    import eepass

    names = {Path(name.replace(".", "/")).name for name in MODULES if name.count(".") == 1}
    assert not names & set(eepass.__all__)


def test_the_folders_are_one_package():
    for stage in STAGES:
        assert (ROOT / "eepass" / stage).resolve() == (ROOT / stage).resolve()
