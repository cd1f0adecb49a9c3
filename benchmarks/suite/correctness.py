"""Parts that check results: the GPU's tests, the twin, tokens against the eager model's."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import torch

from benchmarks.suite import engines, reference
from benchmarks.suite.bench import ROOT, Bench
from benchmarks.suite.parts import FORCED, Missing, Notify, Wrong

FORCED_TOKENS = 6
# seconds of a part's time kept for real exits
LEAST_SECONDS = 15.0
# the twin rounds at other places than the small model does; both against float32
TWIN_FACTOR = 2.0


def tests(bench: Bench, notify: Notify) -> dict[str, Any]:
    """The tests marked ``gpu``, in a process of their own."""
    if not bench.on_cuda:
        raise Missing("the tests marked gpu need a CUDA device")
    marked = [p for p in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in p.read_text()]
    found = run_tests(marked, bench.out / "tests.xml", bench.seconds_left() - 2)
    if found["failed"]:
        notify(found)
        raise Wrong(f"{len(found['failed'])} tests fail: {', '.join(found['failed'][:5])}")
    return found


def run_tests(files: list[Path], report: Path, seconds: float) -> dict[str, Any]:
    """Counts and names of a pytest run of ``files``; ``Missing`` without pytest or in no time."""
    if importlib.util.find_spec("pytest") is None:
        raise Missing("pytest is not installed")
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    command += [f"--junitxml={report.resolve()}", *map(str, files)]
    late = ""
    try:
        ended = subprocess.run(command, cwd=ROOT, timeout=seconds, stdout=sys.stderr, check=False)
    except subprocess.TimeoutExpired:
        late = f"cut off after {seconds:.0f} s"
    if late or not report.exists():
        raise Missing(late or f"pytest ended with {ended.returncode}; the end of log.txt says why")
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    bad = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
    skipped = [case for case in cases if case.find("skipped") is not None]
    return {
        "run": len(cases) - len(skipped),
        "skipped": len(skipped),
        "failed": [f"{case.get('classname')}::{case.get('name')}" for case in bad],
    }


@torch.no_grad()
def twin(bench: Bench, notify: Notify) -> dict[str, Any]:
    """The twin's logits beside the small model's, both against the small one in float32."""
    wide = bench.twin
    ids = bench.prompts[0]
    text = torch.tensor([[*ids, *reference.greedy(wide, ids, 16)]], device=bench.device)
    logits = wide(input_ids=text, use_cache=False).logits[0].float()
    small = bench.small.to(bench.device, bench.dtype)
    rounded = small(input_ids=text, use_cache=False).logits[0].float()
    plain = small.float()(input_ids=text, use_cache=False).logits[0]
    small.to(bench.dtype)
    off = float((logits - plain).abs().max())
    small_off = float((rounded - plain).abs().max())
    found = {
        "factor": bench.factor,
        "weights": sum(tensor.numel() for tensor in wide.parameters()),
        "layers": wide.config.num_hidden_layers,
        "hidden": wide.config.hidden_size,
        "dtype": str(bench.dtype).removeprefix("torch."),
        "largest_logit": float(plain.abs().max()),
        "off_float32": off,
        "small_off_float32": small_off,
        "argmax_as_float32": float((logits.argmax(-1) == plain.argmax(-1)).float().mean()),
        "prompts": len(bench.prompts),
        "prompt_tokens": [len(ids) for ids in bench.prompts],
        "new_tokens": bench.new_tokens,
    }
    if bench.on_cuda:
        found["memory_bytes"] = torch.cuda.memory_allocated()
    if off > TWIN_FACTOR * small_off + 1e-4 * found["largest_logit"]:
        notify(found)
        raise Wrong(f"the twin's logits are off by {off:.3g}, the small model's by {small_off:.3g}")
    return found


def compiled(bench: Bench, notify: Notify) -> dict[str, Any]:
    """Trace and compile the twin, which all launch modes share."""
    transformed, seconds = bench.timed(lambda: engines.transformed(bench))
    return {"seconds": seconds, "rows": transformed.decoder.buckets,
            "distinct_layers": transformed.splits[1].distinct_layers}  # fmt: skip


@torch.no_grad()
def equality(bench: Bench, notify: Notify, mode: str) -> dict[str, Any]:
    """Tokens of a launch mode against the eager twin: dense, exits forced at every layer, real."""
    engine = engines.engine(bench, mode)
    found: dict[str, Any] = {}
    wide = bench.twin
    limit = found["noise"] = bench.limit
    count = bench.new_tokens

    def judged(how: engines.How, prompts: list[list[int]]) -> dict[str, Any]:
        verdict = reference.Verdict()
        for ids in prompts:
            tokens = engine.answer(ids, count, how).tokens
            verdict.judge(reference.follow(wide, ids, tokens)[1], tokens, limit, f"{mode}, {how}")
        return verdict.found()

    for how in (engines.DENSE, engines.NEVER, engines.EXACT):
        found[how.name] = engines.or_missing(lambda how=how: judged(how, bench.prompts))
        notify(found)
    found["forced"] = engines.or_missing(lambda: _forced(bench, engine))
    notify(found)
    found["exits"] = engines.or_missing(lambda: _real(bench, engine))
    found["launch_report"] = engine.launch_report()
    return found


def _forced(bench: Bench, engine: engines.Engine) -> dict[str, Any]:
    """Each layer in turn, those that are timed first; as many as there is time for."""
    verdict = reference.Verdict()
    layers = list(range(1, bench.twin.config.num_hidden_layers))
    layers.sort(key=lambda layer: (layer not in FORCED, layer))
    done = []
    for layer in layers:
        if bench.seconds_left() < LEAST_SECONDS:
            break
        judge_forced(bench, engine, layer, FORCED_TOKENS, verdict)
        done.append(layer)
    found = {**verdict.found(), "layers": len(done)}
    if missing := sorted(set(layers) - set(done)):
        found["no_time_for_layers"] = missing
    return found


def judge_forced(
    bench: Bench, engine: engines.Engine, layer: int, count: int, verdict: reference.Verdict
) -> None:
    """Every token exits after ``layer`` and is the LM head's argmax there."""
    ids = bench.prompts[0]
    answer = engine.answer(ids, count, engines.How("forced", layer))
    # the first token is the prompt's, which runs through all layers
    if late := [own for own in answer.layers[1:] if own != layer]:
        raise Wrong(f"{engine.mode}: forced to exit after {layer}, tokens exit after {late[0]}")
    hidden_states, _ = reference.follow(bench.twin, ids, answer.tokens)
    logits = engine.exit_logits(layer, hidden_states[layer][1:], forced=True)
    what = f"{engine.mode}, exit after {layer}"
    verdict.judge(logits, answer.tokens[1:], bench.limits[layer], what)


def _real(bench: Bench, engine: engines.Engine) -> dict[str, Any]:
    """Tokens that exit early are the argmax of the hot rows there, the others the model's."""
    verdict, depth = reference.Verdict(), bench.twin.config.num_hidden_layers
    layers: list[int] = []
    agreeing = 0
    for ids in bench.prompts:
        answer = engine.answer(ids, bench.new_tokens, engines.REAL)
        agreeing += judge_exits(bench, engine, ids, answer, verdict)
        layers += answer.layers[1:]
    if not any(layer < depth for layer in layers):
        raise Wrong(f"{engine.mode}: no token exits early, so nothing is tested")
    tokens = verdict.tokens
    return {**verdict.found(), "agreement": agreeing / tokens,
            "mean_exit_layer": sum(layers) / len(layers),
            "exit_layers": [layers.count(layer) for layer in range(depth + 1)]}  # fmt: skip


def judge_exits(
    bench: Bench, engine: engines.Engine, ids: list[int], answer: engines.Answer,
    verdict: reference.Verdict,
) -> int:  # fmt: skip
    """A token that exits early is the argmax of the hot rows there, and a draft token; any other is
    the model's. Returns how many are the eager argmax."""
    hidden_states, logits = reference.follow(bench.twin, ids, answer.tokens)
    limit = max(bench.limits[layer] for layer in answer.layers)
    tokens = torch.tensor(answer.tokens, device=logits.device)
    agreeing = int((logits.argmax(-1) == tokens).sum())
    behind = logits.max(-1).values - logits.gather(1, tokens[:, None])[:, 0]
    for index, layer in enumerate(answer.layers):
        # the last exit, after all layers, reads the hot rows of the head alone
        if index and (layer < len(hidden_states) - 1 or behind[index] > limit):
            row = slice(index, index + 1)
            logits[index] = engine.exit_logits(layer, hidden_states[layer][row])[0]
            drafting = hidden_states[engine.drafting][row]
            _require_draft(drafting, answer.tokens[index], engine, limit)
    verdict.judge(logits, answer.tokens, limit, f"{engine.mode}, real exits")
    return agreeing


def _require_draft(hidden: torch.Tensor, token: int, engine: engines.Engine, limit: float) -> None:
    (logits,) = engine.exit_logits(engine.drafting, hidden)
    least = float(logits.topk(engine.draft_tokens).values[-1])
    if float(logits[token]) < least - limit:
        raise Wrong(f"{engine.mode}: token {token} exits early and is no draft token")
