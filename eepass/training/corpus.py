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
    """The tokens of a prompt and its answer, and the split the prompt belongs to."""

    prompt: list[int]
    answer: list[int]
    split: str


# by prompt, so that no prompt's answers are in two splits: the draft head and the translators are
# trained on the first, predictors on the second, thresholds on the third
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
    """The split of a prompt, by a hash of its tokens."""
    fraction = int.from_bytes(_hash(prompt)[:4], "big") / 2**32
    return next(name for name, end in SPLITS if fraction < end)


def _hash(prompt: Sequence[int]) -> bytes:
    return hashlib.sha256(repr(list(prompt)).encode()).digest()


def generate_prompts(
    model: Any,
    turn: tuple[list[int], list[int]],
    stop: frozenset[int],
    count: int,
    on_batch: Callable[[list[list[int]]], None],
    batch_size: int = 32,
    longest: int = 96,
) -> None:
    """Prompts that the model writes itself, in place of the user's message.

    ``turn``: tokens before and after a user's message. After Magpie (Xu et al., 2024): a model that
    is tuned to answer users has learned to continue an empty user's turn with a plausible prompt.
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
            prompts.append([*opening, *row[: _length(row, stop)], *closing])
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
    """The model's own answers, greedy or sampled at a ``temperature``, in batches of prompts.

    ``on_batch`` gets each batch; generation ends after about ``tokens`` answer tokens. Raises
    ``InputError`` for a prompt as long as the model's maximum length.
    """
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    pad = min(stop) if stop else 0
    # in an order of their own: where the token limit ends this early, all kinds have their share
    shuffled = sorted(prompts, key=_hash)
    made = 0
    for begin in range(0, len(shuffled), batch_size):
        if made >= tokens:
            return
        batch = shuffled[begin : begin + batch_size]
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
            # with its stop token
            answer = row[: _length(row, stop) + 1]
            examples.append(Example(prompt, answer, split_of(prompt)))
            made += len(answer)
        on_batch(examples)


def _length(tokens: Sequence[int], stop: frozenset[int]) -> int:
    """The number of tokens before the first stop token."""
    return next((i for i, token in enumerate(tokens) if token in stop), len(tokens))
