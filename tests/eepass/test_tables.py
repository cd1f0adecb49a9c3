"""What commands print fits a terminal of 80 columns, and decoding ends in a sentence."""

import re
from types import SimpleNamespace

import pytest

from eepass.cli import bench, train, transform
from eepass.cli.console import MODE_NAMES, console, outcome, show_outcome, speed_up, table
from eepass.runtime.drafting.planner import Planner
from eepass.runtime.drafting.tree import Tree
from eepass.runtime.statistics import Statistics

STEADY = {"lower": 12.07, "upper": 12.71, "lowest": 10.02, "highest": 13.5, "blocks": 128}
WILD = {"lower": 10.4, "upper": 22.6, "lowest": 10.1, "highest": 23.8, "blocks": 128}
OWN = (
    "eepass-dense", "eepass-approximate", "eepass-exact", "eepass-speculative",
    "eepass-speculative-t3",
)  # fmt: skip
SYSTEMS = ("hf-eager", "hf-compiled", "llama.cpp", *OWN)


@pytest.fixture
def printed(monkeypatch):
    """A function that gives what another prints at 80 columns."""
    monkeypatch.setattr(console, "width", 80)

    def printed(show, *arguments):
        with console.capture() as captured:
            show(*arguments)
        text = captured.get()
        assert max(map(len, text.splitlines())) <= 80
        assert "…" not in text
        return text

    return printed


def headers(text):
    """The cells of each header: the lines above the rules."""
    lines = text.splitlines()
    return [
        re.split(r"\s{2,}", lines[i - 1].strip()) for i, line in enumerate(lines) if "──" in line
    ]


def bench_result(reference, value, spread):
    quality = {
        "accepted_per_pass": 1.93, "mean_exit_layer": 29.4, "agreement": 0.9876, "exact_match": 1.0,
    }  # fmt: skip
    point = {
        "preset": "default", "target": 0.975, "agreement": 0.9761, "mean_exit_layer": 27.3,
        "ratio_to_dense": value, "ratio_to_dense_spread": spread,
    }  # fmt: skip
    return {
        "model": "HuggingFaceTB/SmolLM2-135M-Instruct", "prompts": 128, "new_tokens": 1024,
        "dtype": "bfloat16", "threads": 128, "block_tokens": 16, "reference": reference,
        "systems": {
            name: {"ms_per_token": 1234.56, **(quality if name in OWN else {})} for name in SYSTEMS
        },
        "ratios": dict.fromkeys(SYSTEMS, value),
        "ratios_spread": dict.fromkeys(SYSTEMS, spread),
        "ratios_to_dense": dict.fromkeys(SYSTEMS, value),
        "ratios_to_dense_spread": dict.fromkeys(SYSTEMS, spread),
        "ratios_to_llama": dict.fromkeys(SYSTEMS, value),
        "ratios_to_llama_spread": dict.fromkeys(SYSTEMS, spread),
        "by_position": [
            {"first": 1024, "last": 2047, "tokens": 12345, "agreement": 0.98,
             "mean_exit_layer": 27.3}
        ],
        "frontier": [point, point | {"preset": "paper"}],
    }  # fmt: skip


@pytest.mark.parametrize("reference", ("hf-compiled", "eepass-dense"))
@pytest.mark.parametrize(("value", "spread"), ((12.34, STEADY), (None, WILD)))
def test_bench(printed, reference, value, spread):
    text = printed(bench.show, bench_result(reference, value, spread))
    first = {"hf-compiled": ["vs hf-compiled"], "eepass-dense": []}[reference]
    assert headers(text) == [
        ["system", "ms/token", *first, "vs dense"],
        ["system", "vs llama.cpp"],
        ["system", "tokens/pass", "exit layer", "agreement", "same text"],
        ["tokens", "count", "agreement", "exit layer"],
        ["preset", "target", "agreement", "exit layer", "vs dense"],
    ]
    for name in SYSTEMS:
        assert re.search(rf"^ ?{re.escape(name)} +1234\.56 ", text, re.MULTILINE)
    assert text.count(speed_up(value, spread)) == len(SYSTEMS) * (2 + len(first)) + 2


def test_a_ratio_is_a_number_or_unstable():
    assert speed_up(1.25, STEADY) == "1.25x (12.07-12.71)"
    assert speed_up(None, {**WILD, "lowest": 0.81, "highest": 2.56}) == "unstable (0.8-2.6x)"


def test_probe(printed):
    report = {
        "tokens": 1234, "prompts": 16, "layers": 30, "agreement_by_layer": [0.5] * 30,
        "translated": {"agreement_by_layer": {"16": 0.75, "18": 0.875}}, "lm_head_layers": 8.25,
        "draft_layers": 1.25, "bound": 1.5, "bound_hot": 1.75, "verdict": "may pay: " + "x" * 60,
    }  # fmt: skip
    text = printed(bench.show_probe, report, "HuggingFaceTB/SmolLM2-135M-Instruct")
    assert headers(text) == [["layers run", "agreement", "translated"]]
    assert re.search(r"16 +0\.500 +0\.750", text)
    del report["translated"]
    assert headers(printed(bench.show_probe, report, "it")) == [["layers run", "agreement"]]


def test_train(printed):
    calibration = SimpleNamespace(target=0.975, agreement=0.97, mean_exit_layer=27.3, speedup=1.125)
    part = SimpleNamespace(calibrations=[calibration] * 3)
    text = printed(train.show, SimpleNamespace(presets={"default": part}))
    assert headers(text) == [["target", "agreement", "exit layer", "speed-up (bytes)"]]


def test_codegen(printed):
    kernel = {"registers": 255, "spills": 123, "shared": 232448, "bytes": 123456789, "µs": 1234.5}
    names = ("exit_predictor, rank 128", "verify_head, 128256", "draft_topk, 32000")
    text = printed(transform.show_kernels, {"kernels": dict.fromkeys(names, kernel)}, "it")
    assert headers(text) == [["kernel", "registers", "spills", "shared", "bytes", "µs"]]
    assert all(name in text for name in names)


def test_onnx_statistics(printed):
    rows = [(str(layer), "1024") for layer in range(20, 31)]
    text = printed(table, "where tokens left", ("layers run", "tokens"), rows)
    assert headers(text) == [["layers run", "tokens"]]


def decision(mode, modes=("dense", "exits", "speculation", "both"), hits=0.314):
    return {
        "mode": mode, "modes": list(modes), "ms_per_token": {"dense": 6.81, mode: 4.94},
        "passes": {"dense": 4, mode: 60}, "pass_ms": {1: 6.8, 4: 9.1, 8: 11.2}, "draft_ms": 0.8,
        "draft_hit_rate": hits,
    }  # fmt: skip


def summary():
    found = Statistics(30, tokens=100, passes=52, seconds=0.5)
    found.exit_layers[25] = found.exit_layers[28] = 50
    return found.summary()


COSTS = "a pass of 4 rows costs 9.1 ms, one row 6.8 ms"


@pytest.mark.parametrize(
    ("mode", "sentence"),
    (
        ("dense", f"dense was fastest here: 4.9 ms a token; {COSTS}; drafts hit 0.31."),
        (
            "exits",
            "early exit was fastest here: 26.5 of 30 layers a token, 4.9 ms a token "
            f"(dense 6.8 ms); {COSTS}; drafts hit 0.31.",
        ),
        (
            "speculation",
            "speculation was fastest here: 1.9 tokens a pass, 4.9 ms a token (dense 6.8 ms); "
            f"{COSTS}; drafts hit 0.31.",
        ),
        (
            "both",
            "speculation with early exit was fastest here: 1.9 tokens a pass, 26.5 of 30 layers "
            f"a token, 4.9 ms a token (dense 6.8 ms); {COSTS}; drafts hit 0.31.",
        ),
    ),
)
def test_a_sentence_for_each_way_of_decoding(mode, sentence):
    assert outcome(summary(), decision(mode)) == sentence
    without = outcome(summary(), decision(mode, hits=None))
    assert without == sentence.replace("; drafts hit 0.31", "")
    alone = outcome(summary(), decision(mode, modes=(mode,)))
    assert alone.startswith(f"{MODE_NAMES[mode]}, as asked: ") and "fastest" not in alone


def test_a_planner_says_what_the_sentence_needs():
    planner = Planner({1: 0.007, 4: 0.009}, 0.001, 2.0, ("dense", "speculation"))
    assert planner.decision()["draft_hit_rate"] is None
    # before the first pass: expectations, and no figure of a way that was not used
    assert "5.0 ms a token; a pass" in outcome(summary(), planner.decision())
    tree = Tree([5])
    for token in (6, 7):
        tree.add(token, 0, 0.5, (0, token))
    planner.learn(tree, [6])
    assert planner.decision()["draft_hit_rate"] == 0.5
    for _ in range(60):
        planner.mode()
        assert len(planner.choose(tree, 7)) == 3
        planner.observe(4, 0.009)
        planner.record("speculation", 4, 0.009, 2, 2)
    text = outcome(summary(), planner.decision())
    assert text.startswith("speculation was fastest here: 1.9 tokens a pass, 4.5 ms a token")
    assert text.endswith("a pass of 4 rows costs 9.0 ms, one row 7.0 ms; drafts hit 0.50.")


def test_stats_end_in_tables_and_the_sentence(printed):
    text = printed(show_outcome, summary(), decision("speculation"))
    assert headers(text) == [["layers run", "tokens"], ["figure", "value"]]
    assert "{" not in text
    assert "speculation was fastest here: 1.9 tokens a pass" in text
