"""How long a training will take and how much disk it will need, from a few passes measured."""

from __future__ import annotations

import resource
import sys
import time

import torch

from eepass.runtime.decoder.side_inputs import Row
from eepass.training.dense_model import HOT_TOKENS, DenseModel

# of a prompt, of one that the model writes, and of an answer, about
PROMPT_TOKENS, OWN_PROMPT_TOKENS, ANSWER_TOKENS = 60, 40, 110
# products of each answer token with the hot rows of the LM head while all is trained: translators,
# draft head and predictors
HOT_PRODUCTS = 120


def forecast(model: DenseModel, tokens: int, own_prompts: int) -> str:
    """What is to come: ``tokens`` of answers, ``own_prompts`` prompts."""
    seconds = seconds_a_token(model)
    if not tokens:
        return f"the model reads {1 / seconds:.0f} tokens a second here"
    prompt_tokens = PROMPT_TOKENS * tokens / ANSWER_TOKENS + OWN_PROMPT_TOKENS * own_prompts
    writing = seconds * (tokens + prompt_tokens)
    training = HOT_PRODUCTS * _hot_product(model) * tokens
    return (
        f"the model writes about {1 / seconds:.0f} tokens a second here: about "
        f"{_minutes(writing)} for prompts and answers, then about {_minutes(training)} of training"
    )


def peak_memory() -> int:
    """Bytes this process has held at most."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@torch.no_grad()
def seconds_a_token(model: DenseModel) -> float:
    """Of a full pass of sequences that are decoded together, the shortest of a few."""
    decoder, count = model.decoder, model.batch
    at = min(64, model.max_length - 1)
    slots = [number * model.max_length for number in range(count)]
    rows = [Row(first, at, first + at) for first in slots]
    times = []
    for _ in range(4):
        began = time.perf_counter()
        decoder.logits(decoder.forward([0] * count, rows, 0))
        times.append(time.perf_counter() - began)
    return min(times) / count


@torch.no_grad()
def _hot_product(model: DenseModel) -> float:
    """Seconds a row of a product with the hot rows of the LM head takes."""
    head = model.lm_head[:HOT_TOKENS]
    states = head.new_ones(512, head.shape[1])
    times = []
    for _ in range(3):
        began = time.perf_counter()
        states @ head.T
        times.append(time.perf_counter() - began)
    return min(times) / len(states)


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds > 90 else f"{seconds:.0f} seconds"
