"""Prompts and the model's own answers to them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from eepass.errors import InputError
from eepass.lengths import refuse_longer, usual_length


class Example(NamedTuple):
    """One prompt as tokens, the answer, and the split it belongs to by its prompt."""

    prompt: list[int]
    answer: list[int]
    split: str


# by prompt, so that no answer is on both sides; drafts and translators, predictors, thresholds
SPLITS = (("fit", 0.80), ("predict", 0.92), ("calibrate", 1.0))


def read_prompts(path: Path, limit: int | None = None) -> list[str]:
    """Prompts of a JSONL file: ``{"prompt": ...}`` or ``{"turns": [...]}`` a line.

    Raises ``InputError`` naming the file and the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as text ({error})") from error
    prompts: list[str] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            prompt = record["turns"][0] if "turns" in record else record["prompt"]
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise InputError(
                f'{path}, line {number}: expected {{"prompt": "..."}} or {{"turns": ["..."]}}'
            ) from error
        if not isinstance(prompt, str) or not prompt.strip():
            raise InputError(f"{path}, line {number}: the prompt is empty")
        prompts.append(prompt)
        if limit is not None and len(prompts) >= limit:
            break
    if not prompts:
        raise InputError(f"{path}: no prompts in it")
    return prompts


def read_answers(path: Path, prompts: Sequence[list[int]], vocabulary: int) -> list[Example]:
    """Examples of a JSONL file ``{"prompt": index, "answer": [token ids]}`` over ``prompts``."""
    examples = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = json.loads(line)
            prompt, answer = prompts[record["prompt"]], [int(token) for token in record["answer"]]
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise InputError(
                f'{path}, line {number}: expected {{"prompt": index, "answer": [token ids]}}'
            ) from error
        if not answer or max(answer) >= vocabulary or min(answer) < 0:
            raise InputError(f"{path}, line {number}: token ids outside the vocabulary, or none")
        examples.append(Example(prompt, answer, split_of(prompt)))
    return examples


def split_of(prompt: Sequence[int]) -> str:
    digest = hashlib.sha256(repr(list(prompt)).encode()).digest()
    place = int.from_bytes(digest[:4], "big") / 2**32
    return next(name for name, end in SPLITS if place < end)


def generate_prompts(
    model: Any,
    turn: tuple[list[int], list[int]],
    stop: frozenset[int],
    count: int,
    on_batch: Callable[[list[list[int]]], None],
    batch_size: int = 32,
    longest: int = 96,
) -> None:
    """Prompts the model writes itself when it is given an empty user's turn.

    ``turn``: tokens before and after what a user says. After Magpie (Xu et al., 2024): a model that
    was taught to answer has learned what it is asked, too.
    """
    opening, closing = turn
    made = 0
    while made < count:
        ids = torch.tensor([opening] * min(batch_size, count - made))
        with torch.no_grad():
            output = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                temperature=1.0,
                top_p=0.95,
                top_k=0,
                max_new_tokens=longest,
                eos_token_id=sorted(stop) or None,
                pad_token_id=min(stop) if stop else 0,
            )
        prompts = []
        for row in output[:, len(opening) :].tolist():
            said = row[: next((i for i, token in enumerate(row) if token in stop), len(row))]
            prompts.append([*opening, *said, *closing])
        made += len(prompts)
        on_batch(prompts)


def generate_answers(
    model: Any,
    prompts: Sequence[list[int]],
    stop: frozenset[int],
    tokens: int,
    on_batch: Callable[[list[Example]], None],
    temperature: float = 0.0,
    batch_size: int = 32,
    longest: int = 224,
) -> None:
    """Answers of the model itself, greedy or sampled at a ``temperature``, in batches of prompts.

    ``on_batch`` gets each batch as it is done; ends after about ``tokens`` answer tokens. Raises
    ``InputError`` for a prompt that leaves its answer none of the positions the model knows.
    """
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    pad = min(stop) if stop else 0
    order = sorted(
        range(len(prompts)), key=lambda i: hashlib.sha256(repr(prompts[i]).encode()).digest()
    )
    made = 0
    for begin in range(0, len(order), batch_size):
        if made >= tokens:
            return
        batch = [prompts[i] for i in order[begin : begin + batch_size]]
        width = max(map(len, batch))
        refuse_longer(model, width + 1, "a prompt and its answer")
        ids = torch.full((len(batch), width), pad)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(batch):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        with torch.no_grad():
            output = model.generate(
                input_ids=ids,
                attention_mask=mask,
                **(sampling if temperature else {"do_sample": False}),
                max_new_tokens=usual_length(model, width + longest) - width,
                eos_token_id=sorted(stop) or None,
                pad_token_id=pad,
            )
        examples = []
        for prompt, row in zip(batch, output[:, width:].tolist(), strict=True):
            end = next((i + 1 for i, token in enumerate(row) if token in stop), len(row))
            examples.append(Example(prompt, row[:end], split_of(prompt)))
            made += end
        on_batch(examples)
