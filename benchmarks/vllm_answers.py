"""Greedy answers of vLLM, in a process of its own Python; this file is also what runs there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

# draft tokens, and the longest n-gram looked for: as vLLM's documentation has it
DRAFT_TOKENS, LONGEST = 5, 4
# requests at once, and gigabytes of cache
TOGETHER, CACHE_GB = 8, 2


def vllm_answers(
    python: Path | None, loaded: Any, prompts: Sequence[list[int]], new_tokens: int,
    versions: dict[str, str],
) -> Iterator[tuple[str, Any]]:  # fmt: skip
    """As of ``benchmarks.answers``; notes vLLM's version and its torch's in ``versions``."""
    from benchmarks.answers import Answers
    from eepass.errors import InputError

    if python is None or not python.is_file():
        raise InputError(f"no vLLM at {python}: --vllm PYTHON, of an environment that has it")
    with TemporaryDirectory() as name:
        folder = Path(name)
        loaded.model.save_pretrained(folder / "model")
        loaded.tokenizer.save_pretrained(folder / "model")
        task = {
            "model": str(folder / "model"), "prompts": list(prompts), "new_tokens": new_tokens,
            "stop": sorted(loaded.stop), "out": str(folder / "answers.json"),
        }  # fmt: skip
        for drafting in (False, True):
            (folder / "task.json").write_text(json.dumps({**task, "drafting": drafting}))
            ran = subprocess.run(
                [str(python), __file__, str(folder / "task.json")], stdout=sys.stderr, check=False,
                env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": str(CACHE_GB), "PYTHONPATH": ""},
            )  # fmt: skip
            if ran.returncode:
                raise InputError(f"vLLM's process ended with status {ran.returncode}")
            found = json.loads((folder / "answers.json").read_text())
            versions |= found["versions"]
            for way, tokens in found["ways"].items():
                yield way, Answers(tokens)


def run(task: dict[str, Any]) -> dict[str, Any]:
    """The answers, alone and together; within vLLM's environment."""
    import torch
    import vllm

    options: dict[str, Any] = {}
    if task["drafting"]:
        options["speculative_config"] = {
            "method": "ngram", "num_speculative_tokens": DRAFT_TOKENS, "prompt_lookup_max": LONGEST,
        }  # fmt: skip
    length = max(map(len, task["prompts"])) + task["new_tokens"] + DRAFT_TOKENS
    engine = vllm.LLM(
        model=task["model"], dtype="bfloat16", max_model_len=length, max_num_seqs=TOGETHER,
        enable_prefix_caching=False, seed=0, **options,
    )  # fmt: skip
    sampling = vllm.SamplingParams(
        temperature=0.0, max_tokens=task["new_tokens"], stop_token_ids=task["stop"]
    )
    prompts = [{"prompt_token_ids": ids} for ids in task["prompts"]]

    def answers(batches: list[list[dict[str, Any]]]) -> list[list[int]]:
        found = [engine.generate(batch, sampling, use_tqdm=False) for batch in batches]
        return [list(one.outputs[0].token_ids) for batch in found for one in batch]

    drafts = "n-gram drafts, " if task["drafting"] else "greedy, "
    alone = [[prompt] for prompt in prompts]
    ways = {f"{drafts}alone": answers(alone)}
    if not task["drafting"]:
        ways[f"{drafts}once more"] = answers(alone)
    ways[f"{drafts}{TOGETHER} together"] = answers([prompts])
    return {"versions": {"vllm": vllm.__version__, "vllm's torch": torch.__version__}, "ways": ways}


if __name__ == "__main__":
    # what lies beside this file is not what vLLM means by these names
    del sys.path[0]
    given = json.loads(Path(sys.argv[1]).read_text())
    Path(given["out"]).write_text(json.dumps(run(given)))
