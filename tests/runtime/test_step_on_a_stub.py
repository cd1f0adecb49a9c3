"""A whole step as one graph, through the real cuda-bindings and a driver in C: its nodes and their
order, how blocks are captured, what the graph decodes, and what becomes of failures."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
STUB = TESTS / "stub_cuda"
# of a step of 4 layers, exits after three of them and four row counts
CONDITIONALS, NODES = 22, 65
# of one over the rows of a tree, exits after three of them
TREE_NODES = 35


def compiler_and_header():
    """What compiles the stub, and the folder of cuda.h; skips where either is missing."""
    if importlib.util.find_spec("cuda") is None:
        pytest.skip("cuda-bindings is not installed")
    compiler, triton = shutil.which("cc"), importlib.util.find_spec("triton")
    if compiler is None or triton is None:
        pytest.skip("no C compiler, or no triton, which brings cuda.h")
    headers = Path(triton.origin).parent / "backends" / "nvidia" / "include"
    if not (headers / "cuda.h").exists():
        pytest.skip("this triton brings no cuda.h")
    return compiler, headers


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    compiler, headers = compiler_and_header()
    folder = tmp_path_factory.mktemp("driver")
    library = folder / "libcuda.so.1"
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-I", headers, "-o", library,
         STUB / "libcuda.c"], check=True,
    )  # fmt: skip
    environment = {**os.environ, "LD_LIBRARY_PATH": str(folder)}
    environment["PYTHONPATH"] = os.pathsep.join([str(TESTS.parent), str(TESTS), *sys.path])
    result = subprocess.run(
        [sys.executable, STUB / "program.py", library], env=environment, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout)


def test_a_step_is_one_graph_and_decodes_what_the_interpreter_does(seen):
    assert seen["missing"] == "" and seen["mode"] == "device" and seen["refused"] == []
    assert seen["tokens"] and seen["order"]
    assert seen["launches"] == seen["steps"] and seen["synchronisations"] == 0


def test_the_graph_has_no_more_nodes_than_its_budget(seen):
    """A setter and an IF node for each conditional, a child graph for each block between them."""
    assert seen["conditionals"] == CONDITIONALS
    assert seen["nodes"] <= NODES


def test_captures_are_undisturbed(seen):
    """The collector has run before the first and waits during each; cuBLAS's workspaces are cleared
    before and after each."""
    events = [tuple(event) for event in seen["events"]]
    what = [event[0] for event in events]
    assert what.index("collect") < what.index("begin")
    begins = [at for at, name in enumerate(what) if name == "begin"]
    assert len(begins) > 20
    for at in begins:
        assert what[at - 1 : at + 4] == ["clear", "begin", "capture", "end", "clear"]
        assert not any(collects for _, _, collects in events[at - 1 : at + 4])
        assert events[at][1][1:] == ["pool", "thread_local"]
    assert events[0][2], "it is on again outside"


def test_a_speculative_pass_is_one_graph_of_one_block(seen):
    """No conditionals, no waiting: a launch a pass, and up to as many more as are in flight when
    the answer ends."""
    found = seen["speculative"]
    assert found["mode"] == "device" and found["tokens"]
    assert found["nodes"] == 1 and found["synchronisations"] == 0
    assert found["passes"] <= found["launches"] <= found["passes"] + 1
    assert found["decoded"] == 99 and found["passes"] < 50


def test_a_pass_with_a_draft_heads_tree_is_one_graph(seen):
    """The head's levels, the layers and the accept walk are one block; keys and values of an
    accepted path move in the body of an IF node, without which the tokens would be others."""
    found = seen["tree"]
    assert found["mode"] == "device" and found["tokens"] and found["refused"] == []
    assert found["first"] == "draft from head"
    assert sorted(found["nodes"]) == ["child", "child", "if", "set"]
    assert found["passes"] <= found["launches"] <= found["passes"] + 1
    assert found["synchronisations"] == 0
    assert found["decoded"] == 99 and found["passes"] < 60


def test_a_pass_with_exits_in_a_tree_is_one_graph(seen):
    """Segments, predictors and the head are bodies of IF nodes, and the host never waits."""
    found = seen["exits in a tree"]
    assert found["mode"] == "device" and found["tokens"] and found["refused"] == []
    assert found["layers"] == [1, 2, 3, 4]
    assert found["nodes"] <= TREE_NODES
    assert found["passes"] <= found["launches"] <= found["passes"] + 1
    assert found["synchronisations"] == 0


def test_closing_frees_what_was_made(seen):
    assert seen["alive"] == 0


def test_any_call_that_fails_gives_way_to_a_simpler_mode(seen):
    for name, found in seen["fallbacks"].items():
        assert found["mode"] == ("calls" if name == "a capture" else "host"), name
        assert found["tokens"] and found["alive"] == 0, name
        expected = "not permitted when stream is capturing" if name == "a capture" else name
        assert expected in found["why"] and "\n" not in found["why"]
    assert "the device failed while decoding (cuGraphLaunch" in seen["launch"]
