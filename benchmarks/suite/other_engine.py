"""Decode greedily with vLLM or SGLang: a request as JSON on stdin, answers and times on stdout.

A program of its own, without eepass: these engines want a device to themselves.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from time import perf_counter
from typing import Any

ROUNDS = 3
# share of the device's memory; the suite's own twin stays where it is
MEMORY = 0.4
Generate = Callable[[list[int], int], list[int]]


def vllm(folder: str, length: int) -> Generate:
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=folder, skip_tokenizer_init=True, dtype="bfloat16", max_model_len=length,
        gpu_memory_utilization=MEMORY, enable_prefix_caching=False,
    )  # fmt: skip

    def generate(ids: list[int], tokens: int) -> list[int]:
        sampling = SamplingParams(
            temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False
        )
        (answer,) = engine.generate([{"prompt_token_ids": ids}], sampling, use_tqdm=False)
        return list(answer.outputs[0].token_ids)

    return generate


def sglang(folder: str, length: int) -> Generate:
    from sglang import Engine

    engine = Engine(
        model_path=folder, skip_tokenizer_init=True, dtype="bfloat16", context_length=length,
        mem_fraction_static=MEMORY, disable_radix_cache=True,
    )  # fmt: skip

    def generate(ids: list[int], tokens: int) -> list[int]:
        sampling = {"temperature": 0.0, "max_new_tokens": tokens, "ignore_eos": True}
        return list(engine.generate(input_ids=ids, sampling_params=sampling)["output_ids"])

    return generate


def measure(order: dict[str, Any], generate: Generate) -> dict[str, Any]:
    """Answers, and milliseconds a token by prompt: whole answers less the time to a first token."""
    tokens, answers, times = order["tokens"], [], []

    def seconds(ids: list[int], count: int) -> float:
        began = perf_counter()
        generate(ids, count)
        return perf_counter() - began

    for ids in order["prompts"]:
        answers.append(generate(ids, tokens))
        generate(ids, 1)
        rounds = [seconds(ids, tokens) - seconds(ids, 1) for _ in range(ROUNDS)]
        times.append(1e3 * statistics.median(rounds) / (tokens - 1))
    return {"said": answers, "ms_per_token": times}


def main() -> None:
    # this folder has modules of names that packages have too
    del sys.path[0]
    order = json.load(sys.stdin)
    generate = {"vllm": vllm, "sglang": sglang}[order["module"]](order["folder"], order["length"])
    print(json.dumps(measure(order, generate)), flush=True)


if __name__ == "__main__":
    main()
