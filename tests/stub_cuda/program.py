"""Steps captured and launched through the real cuda-bindings, over a stub of the driver.

Run with the stub's folder in LD_LIBRARY_PATH; prints what was seen as JSON.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys

import torch
from exits_in_trees import Script, ScriptedTreeExits
from made_heads import bigrams, drafts_of
from models import eager_compile, tiny_model
from plain import PlainEngine
from steps import BUCKETS, OrderedExits, engine_for

from eepass.errors import EngineError
from eepass.passes.pipeline import split_for_rows
from eepass.runtime.decoder.decoder import Decoder
from eepass.runtime.engine.engine import Engine
from eepass.runtime.step import launching, text_drafts
from eepass.runtime.step.build_exiting import build_exiting_step
from eepass.runtime.step.conditional_graph import conditional_nodes_missing
from eepass.runtime.step.data import Conditional, blocks, walk
from eepass.runtime.step.layout import StepOptions
from eepass.runtime.step.tree_shape import TreeShape
from stub_cuda.fake_torch import FakeGraph, install

PROMPT, COUNT = [5, 9, 44, 7, 8], 24
TREE = TreeShape((4, 2, 1))
CALLS = (
    "cuCtxGetCurrent", "cuModuleLoadData", "cuModuleGetFunction", "cuGraphCreate",
    "cuGraphConditionalHandleCreate", "cuGraphAddKernelNode", "cuGraphAddNode",
    "cuGraphAddChildGraphNode", "cuGraphInstantiate", "cuGraphUpload",
)  # fmt: skip
library = ctypes.CDLL(sys.argv[1])
library.stub_log.restype = ctypes.c_char_p
BEST = launching.Launching("device", "conditional graph nodes are there", auto=True)


@ctypes.CFUNCTYPE(None, ctypes.c_ulonglong)
def on_child(number):
    FakeGraph.made[number].replay()


def exits():
    wanted = [{1}, {2}, set(), {1}, {1, 2}, {2}, set(), {3}] * 6
    return OrderedExits((1, 2, 3), wanted, list(range(20, 68)), [1, 1, 1, 2] * 12)


def order_of(step, items):
    """What a step's graph is to hold, in the words of the stub's log: nested lists."""
    found = []
    for entry in blocks(items):
        if isinstance(entry, Conditional):
            found.append([str(step[entry.flag].data_ptr()), *order_of(step, entry.body)])
        else:
            found.append([launch.name for launch in entry])
    return found


def order_in(log):
    """The same, read from the log."""
    graphs, root, body_of = {}, None, {}
    for line in log.splitlines():
        what, *pairs = line.split()
        given = dict(pair.split("=") for pair in pairs if "=" in pair)
        if what not in ("child", "set", "if"):
            continue
        root = root or given["graph"]
        mine = graphs.setdefault(given["graph"], [])
        if what == "child":
            mine.append(names[int(given["child"])])
        elif what == "set":
            mine.append([given["flag"]])
        else:
            body_of[given["body"]] = mine[-1]
    for body, entry in body_of.items():
        entry.extend(graphs.get(body, []))
    return graphs[root]


def made(scripted, options=None):
    """A new engine, its report, and the tokens it decodes."""
    engine, report = launching.make_engine(decoder, scripted, options or StepOptions(), BEST)
    # warm-up has asked for draft tokens
    scripted.turn = -1
    return engine, report, [tuple(token) for token in engine.generate(PROMPT, COUNT)]


def made_in_a_tree(how):
    """The same of a speculative step with exits."""
    scripted = ScriptedTreeExits(script, (1, 2, 3), TREE.rows)

    def build(*args):
        scripted.step = build_exiting_step(*args)
        return scripted.step

    launching.build_exiting_step = build
    engine, report = launching.make_engine(decoder, scripted, StepOptions(tree=TREE), how)
    return engine, report, [tuple(token) for token in engine.generate(PROMPT, 40)]


library.stub_on_child(on_child)
with torch.no_grad():
    decoder = Decoder(split_for_rows(tiny_model("llama"), 128, BUCKETS, 16)[0], eager_compile)
    expected = [tuple(t) for t in engine_for(decoder, exits()).generate(PROMPT, COUNT)]
    script = Script(PlainEngine(tiny_model("llama")), TREE.rows - 1, seed=5)
    from_text, text_drafts.draft = text_drafts.draft, script.draft
    in_a_tree = made_in_a_tree(launching.choose("interpret", torch.device("cpu")))[2]
    text_drafts.draft = from_text
    install(setattr)
    missing = conditional_nodes_missing((9, 0))
    library.stub_clear()
    engine, report, tokens = made(exits())
    log = library.stub_log().decode()
    names = {}
    for what, detail, _ in FakeGraph.events:
        if what == "begin":
            number = detail[0]
        elif what == "capture":
            names[number] = list(detail)
    seen = {
        "missing": missing,
        "mode": report().mode,
        "tokens": tokens == expected and len({layer for _, layer in tokens}) > 2,
        "synchronisations": report().host_synchronisations,
        "launches": log.count("launch stream=7"),
        "steps": engine.steps,
        "refused": [line for line in log.splitlines() if line.startswith("refused")],
        "order": order_in(log) == order_of(engine.step, engine.step.items),
        "nodes": sum(line.startswith(("child", "set", "if")) for line in log.splitlines()),
        "conditionals": sum(isinstance(item, Conditional) for item in walk(engine.step.items)),
        "events": FakeGraph.events.copy(),
    }
    engine.close()
    seen["alive"] = library.stub_alive()
    library.stub_clear()
    engine, report = launching.make_engine(decoder, None, StepOptions(tree=TreeShape((7,))), BEST)
    dense = [token.token for token in Engine(decoder).generate(PROMPT, 100)]
    found = [token.token for token in engine.generate(PROMPT, 100)]
    log = library.stub_log().decode()
    seen["speculative"] = {
        "mode": report().mode,
        "tokens": found == dense,
        "nodes": sum(line.startswith(("child", "set", "if")) for line in log.splitlines()),
        "launches": log.count("launch stream=7"),
        "synchronisations": report().host_synchronisations,
        "passes": engine.statistics.passes,
        "decoded": engine.statistics.tokens,
    }
    engine.close()
    # a draft head that names another token first, then mostly the one that follows: the accepted
    # path lies apart in its tree, and its keys and values must be moved
    head = drafts_of(decoder, bigrams([dense]))
    tree = StepOptions(tree=TreeShape(named=7, levels=3))
    library.stub_clear()
    engine, report = launching.make_engine(decoder, None, tree, BEST, head=head)
    found = [token.token for token in engine.generate(PROMPT, 100)]
    log = library.stub_log().decode()
    seen["tree"] = {
        "mode": report().mode,
        "tokens": found == dense,
        "first": engine.step.items[0].name,
        "nodes": [line.split()[0] for line in log.splitlines()
                  if line.startswith(("child", "set", "if"))],
        "launches": log.count("launch stream=7"),
        "refused": [line for line in log.splitlines() if line.startswith("refused")],
        "synchronisations": report().host_synchronisations,
        "passes": engine.statistics.passes,
        "decoded": engine.statistics.tokens,
    }  # fmt: skip
    engine.close()
    # exits in a tree: one graph, launched once a pass
    text_drafts.draft = script.draft
    library.stub_clear()
    engine, report, found = made_in_a_tree(BEST)
    text_drafts.draft = from_text
    log = library.stub_log().decode()
    seen["exits in a tree"] = {
        "mode": report().mode,
        "layers": sorted({layer for _, layer in found}),
        "tokens": found == in_a_tree,
        "nodes": sum(line.startswith(("child", "set", "if")) for line in log.splitlines()),
        "launches": log.count("launch stream=7"),
        "refused": [line for line in log.splitlines() if line.startswith("refused")],
        "synchronisations": report().host_synchronisations,
        "passes": engine.statistics.passes,
    }
    engine.close()
    seen["fallbacks"] = {}
    for name in CALLS:
        library.stub_fail(name.encode(), 1)
        engine, report, tokens = made(exits())
        del engine
        gc.collect()
        seen["fallbacks"][name] = {
            "mode": report().mode,
            "why": report().reason,
            "tokens": tokens == expected,
            "alive": library.stub_alive(),
        }
    FakeGraph.failing = True
    engine, report, tokens = made(exits())
    seen["fallbacks"]["a capture"] = {
        "mode": report().mode, "why": report().reason, "tokens": tokens == expected,
        "alive": library.stub_alive(),
    }  # fmt: skip
    FakeGraph.failing = False
    engine, report, tokens = made(exits())
    library.stub_fail(b"cuGraphLaunch", 3)
    try:
        list(engine.generate(PROMPT, COUNT))
        seen["launch"] = "no error"
    except EngineError as error:
        seen["launch"] = str(error)
json.dump(seen, sys.stdout)
