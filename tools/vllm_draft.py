"""Serve a model with its exported draft head in vLLM, and compare with this engine.

    python tools/vllm_draft.py --vllm /path/to/vllm/bin/python --json benchmarks/results/FILE.json

The head is exported (``--format``), and processes of vLLM's own Python answer with it and without
it, greedily and one prompt at a time. Reported: in how many answers the text differs with the head,
and how near the two likeliest tokens are where it does so first; in how many it differs with
vLLM's own n-gram drafts, with our text drafts as its plug-in, and from one run without drafts to
the next, which is vLLM's own noise; what came of both kinds of text drafts; draft tokens accepted
by position; and the tokens a pass gives, beside what this engine gives with a
chain of as many draft tokens from the same head: with its own answers, and along vLLM's. This file
is also what runs in vLLM's environment.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
QUESTIONS = ROOT / "benchmarks" / "questions.jsonl"
# gigabytes of cache; the longest n-gram looked for; room for draft tokens
CACHE_GB, LONGEST, ROOM = 2, 4, 16
PLUG_IN = "eepass.drafts.vllm_suffix.SuffixDrafts"
# vLLM's counters, and what they are called here
COUNTERS = {
    "vllm:spec_decode_num_drafts": "passes",
    "vllm:spec_decode_num_draft_tokens": "drafted",
    "vllm:spec_decode_num_accepted_tokens": "accepted",
    "vllm:spec_decode_num_accepted_tokens_per_pos": "accepted_by_position",
}


def compare(
    python: Path, spec: str, artifact: Path | None, format: str, count: int, new_tokens: int,
    draft_tokens: int,
) -> dict[str, Any]:  # fmt: skip
    """The figures, of ``count`` answers of ``new_tokens`` with chains of ``draft_tokens``; raises
    ``InputError`` where vLLM fails."""
    import eepass
    from eepass.drafts.write_head import export_draft
    from eepass.errors import InputError

    loaded = eepass.load(spec)
    source = artifact or loaded.artifact
    if source is None:
        raise InputError(f"{spec} has no artefact: give --artifact DIR")
    lines = QUESTIONS.read_text(encoding="utf-8").splitlines()[:count]
    prompts = [loaded.encode(json.loads(line)["prompt"]) for line in lines]
    with TemporaryDirectory() as name:
        folder = Path(name)
        loaded.model.save_pretrained(folder / "model")
        loaded.tokenizer.save_pretrained(folder / "model")
        export_draft(loaded, source, folder / "head", format, str(folder / "model"))
        task = {
            "model": str(folder / "model"), "prompts": prompts, "new_tokens": new_tokens,
            "stop": sorted(loaded.stop), "out": str(folder / "answers.json"),
        }  # fmt: skip
        plain = _answers(python, {**task, "rounds": 2})
        drafts = {"num_speculative_tokens": draft_tokens}
        look_up = {**drafts, "method": "ngram", "prompt_lookup_max": LONGEST}
        ngram = _answers(python, {**task, "drafts": look_up})
        plug_in = {**drafts, "method": "custom_class", "model": PLUG_IN}
        # vLLM imports it by name
        suffix = _answers(python, {**task, "drafts": plug_in}, path=str(ROOT))
        head = {**drafts, "method": "eagle3", "model": str(folder / "head")}
        drafted = _answers(python, {**task, "drafts": head})
    first, again = plain["answers"]
    (with_head,) = drafted["answers"]
    theirs, gaps = drafted["counters"], plain["gaps"]
    ours = _own_chain(loaded, source, prompts, new_tokens, draft_tokens)
    along = _chain_along(loaded, source, prompts, with_head, draft_tokens)
    a_pass = 1 + theirs["accepted"] / theirs["passes"]
    return {
        "model": spec,
        "format": format,
        "versions": {"eepass": eepass.__version__, **drafted["versions"]},
        "answers": len(prompts),
        "tokens": sum(map(len, with_head)),
        "differ_with_head": _differing(first, with_head),
        "gaps_where_they_differ": [
            gaps[prompt][place] for prompt, place in _first_differences(first, with_head)
        ],
        "differ_with_ngram_drafts": _differing(first, ngram["answers"][0]),
        "differ_with_suffix_drafts": _differing(first, suffix["answers"][0]),
        "differ_once_more": _differing(first, again),
        "differ_from_eepass": _differing(first, ours.pop("answers")),
        "draft_tokens": draft_tokens,
        "vllm": {**theirs, "tokens_a_pass": a_pass},
        "vllm_ngram_drafts": ngram["counters"],
        "vllm_suffix_drafts": suffix["counters"],
        "eepass": ours,
        "eepass_along_vllm": along,
        "vllm_to_eepass": a_pass / ours["tokens_a_pass"],
        "vllm_to_eepass_along": a_pass / along["tokens_a_pass"],
    }


def _differing(one: Sequence[Sequence[int]], other: Sequence[Sequence[int]]) -> int:
    return sum(list(a) != list(b) for a, b in zip(one, other, strict=True))


def _first_differences(
    one: Sequence[Sequence[int]], other: Sequence[Sequence[int]]
) -> list[tuple[int, int]]:
    """Prompt and place of the first token of each answer that is another."""
    found = []
    for prompt, pair in enumerate(zip(one, other, strict=True)):
        places = [place for place, (a, b) in enumerate(zip(*pair, strict=False)) if a != b]
        found += [(prompt, place) for place in places[:1]]
    return found


def _answers(python: Path, task: dict[str, Any], path: str = "") -> dict[str, Any]:
    from eepass.errors import InputError

    file = Path(task["out"]).with_name("task.json")
    file.write_text(json.dumps(task), encoding="utf-8")
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": str(CACHE_GB), "PYTHONPATH": path}
    try:
        ran = subprocess.run(
            [str(python), __file__, "--task", str(file)], stdout=sys.stderr, check=False,
            env=environment,
        )  # fmt: skip
    except OSError as error:
        raise InputError(
            f"no vLLM at {python}: --vllm PYTHON, of an environment that has it"
        ) from (error)
    if ran.returncode:
        raise InputError(f"vLLM's process ended with status {ran.returncode}")
    found: dict[str, Any] = json.loads(Path(task["out"]).read_text(encoding="utf-8"))
    return found


def _own_chain(
    loaded: Any, artifact: Path, prompts: Sequence[Sequence[int]], new_tokens: int,
    draft_tokens: int,
) -> dict[str, Any]:  # fmt: skip
    """What this engine gives with a chain of the head's likeliest tokens in every pass."""
    import torch

    from eepass.config import ExitConfig
    from eepass.model import transform
    from eepass.runtime.drafting.cascade import Cascade
    from eepass.runtime.drafting.eagle_tree import EagleTree
    from eepass.runtime.drafting.tree import Tree
    from eepass.runtime.engine.engine import Engine
    from eepass.runtime.engine.options import Options

    class Chain(EagleTree):
        """The head's likeliest token, the likeliest after that, and so on."""

        short = 0

        def add_to(self, tree: Tree, budget: Any, read: Any) -> None:
            raise NotImplementedError("a chain is proposed whole")

        def propose(self, root: int, budget: Any, read: Any) -> Tree:
            tree, node, above = Tree([root]), 0, 0
            for level in self._begin(read, levels=draft_tokens):
                width = len(level.tokens) // len(level.above)
                if above not in level.above:
                    # it is not among the paths that go on
                    Chain.short += 1
                    break
                above = width * level.above.index(above)
                # taken for certain, so that no token of it is left out of the pass
                node = tree.add(level.tokens[above], node, 1.0, None)
                if len(tree) > budget.most:
                    break
            return tree

        def fresh(self) -> Chain:
            return Chain(self.head.fresh(), self.norm)

    model = transform(
        loaded.model, artifact, ExitConfig(exits=False, speculate="eagle"), stop=loaded.stop
    )
    drafting = model.host_engine(model.config)
    assert isinstance(drafting.draft, Cascade) and isinstance(drafting.draft.head, EagleTree)
    chain = Chain(drafting.draft.head.head, drafting.draft.head.norm)
    engine = Engine(model.decoder, draft=chain, options=Options("exact", modes=("speculation",)))
    with torch.no_grad():
        answers = [
            [step.token for step in engine.generate(list(ids), new_tokens, loaded.stop)]
            for ids in prompts
        ]
    passes = engine.statistics.passes
    # the first token of each is the prompt's
    return {
        "answers": answers,
        "passes": passes,
        "tokens_a_pass": (sum(map(len, answers)) - len(answers)) / passes,
        "chains_cut_short": Chain.short,
    }


def _chain_along(
    loaded: Any, artifact: Path, prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]], draft_tokens: int,
) -> dict[str, Any]:  # fmt: skip
    """What a chain from the head would give if the text were ``answers``: no other decides."""
    import torch

    from eepass.checkpoints.artifact import load_artifact, without_prefix
    from eepass.checkpoints.draft_codes import in_dtype
    from eepass.training.unrolling import unroll

    model = loaded.model
    embedding = model.get_input_embeddings().weight.detach()
    tensors = in_dtype(load_artifact(artifact).tensors, embedding.dtype)
    head = without_prefix(tensors, "eagle.")
    hot = head.get("hot.ids", tensors["hot.ids"]).long()
    hot_head = head.get("hot.head", model.get_output_embeddings().weight.detach()[hot])
    passes, accepted = 0, [0] * draft_tokens
    for prompt, answer in zip(prompts, answers, strict=True):
        text = torch.tensor([[*prompt, *answer]])
        with torch.no_grad():
            hidden = model(text, output_hidden_states=True).hidden_states
            # the last one is normed
            features = torch.cat([hidden[-1], *(hidden[n] for n in head["features"])], -1)
            states = unroll(text[:, 1:], features[:, :-1], embedding, head, draft_tokens)
            named = [hot[(state[0] @ hot_head.T).argmax(-1)].tolist() for state in states]
        ids, last = text[0].tolist(), len(prompt)
        while last + 1 < len(ids):
            right = 0
            while right < min(draft_tokens, len(ids) - last - 1):
                # its row is the one of the token before, and each has one less before it
                if named[right][last - 1 + right] != ids[last + 1 + right]:
                    break
                accepted[right] += 1
                right += 1
            passes += 1
            last += 1 + right
    return {
        "passes": passes,
        "accepted_by_position": accepted,
        "tokens_a_pass": 1 + sum(accepted) / passes,
    }


def run(task: dict[str, Any]) -> dict[str, Any]:
    """The answers, and what vLLM counts; within its environment."""
    import torch
    import vllm

    options: dict[str, Any] = {}
    if "drafts" in task:
        options["speculative_config"] = task["drafts"]
    length = max(map(len, task["prompts"])) + task["new_tokens"] + ROOM
    engine = vllm.LLM(
        model=task["model"], dtype="bfloat16", max_model_len=length, max_num_seqs=1,
        enable_prefix_caching=False, seed=0, disable_log_stats=False, **options,
    )  # fmt: skip
    answers, gaps = [], []
    for number in range(task.get("rounds", 1)):
        # the likeliest two once more, where nothing else differs
        sampling = vllm.SamplingParams(
            temperature=0.0, max_tokens=task["new_tokens"], stop_token_ids=task["stop"],
            logprobs=2 if number else None,
        )  # fmt: skip
        found = [
            engine.generate([{"prompt_token_ids": ids}], sampling, use_tqdm=False)[0]
            for ids in task["prompts"]
        ]
        answers.append([list(one.outputs[0].token_ids) for one in found])
        if number:
            gaps = [[_gap(step) for step in one.outputs[0].logprobs] for one in found]
    counters = {
        COUNTERS[metric.name]: getattr(metric, "value", None) or list(getattr(metric, "values", ()))
        for metric in engine.get_metrics()
        if metric.name in COUNTERS
    }
    versions = {"vllm": vllm.__version__, "vllm's torch": torch.__version__}
    return {"versions": versions, "answers": answers, "gaps": gaps, "counters": counters}


def _gap(step: Any) -> float:
    """Between the log-probabilities of the two likeliest tokens."""
    best, second = sorted((token.logprob for token in step.values()), reverse=True)[:2]
    return float(best - second)


def main() -> None:
    """Parse the command line, compare, print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--vllm", type=Path, help="Python of an environment that has vLLM")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--artifact", type=Path)
    parser.add_argument("--format", default="eagle3", choices=("eagle3", "speculators"))
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--draft-tokens", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--task", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.task is not None:
        # what lies beside this file is not what vLLM means by these names
        del sys.path[0]
        task = json.loads(given.task.read_text(encoding="utf-8"))
        Path(task["out"]).write_text(json.dumps(run(task)), encoding="utf-8")
        return
    # a checkout need not be installed
    sys.path[0] = str(ROOT)
    if given.vllm is None:
        parser.error("--vllm PYTHON: of an environment that has vLLM")
    try:
        found = compare(
            given.vllm, given.model, given.artifact, given.format, given.prompts, given.tokens,
            given.draft_tokens,
        )  # fmt: skip
    except ValueError as error:
        parser.error(str(error))
    text = json.dumps(found, indent=1)
    print(text)
    if given.json is not None:
        given.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
