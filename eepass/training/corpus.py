"""Prompts and the model's own answers to them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from eepass.checkpoints.models import LoadedModel
from eepass.errors import InputError
from eepass.lengths import refuse_longer, usual_length
from eepass.reading import list_of, parse_json, read_lines, whole_number
from eepass.training.progress import Progress, RecordFile


class Example(NamedTuple):
    """The tokens of a prompt and its answer, and the split the prompt belongs to."""

    prompt: list[int]
    answer: list[int]
    split: str


# by prompt, so that no prompt's answers are in two splits: the draft head and the translators are
# trained on the first, predictors on the second, thresholds on the third
SPLITS = (("fit", 0.80), ("predict", 0.92), ("calibrate", 1.0))
# prompts at a time, and the tokens that the model writes at most
BATCH, LONGEST_PROMPT, LONGEST_ANSWER = 32, 96, 224


def read_prompts(path: Path, limit: int | None = None) -> list[str]:
    """Prompts of a JSONL file: ``{"prompt": ...}`` or ``{"turns": [...]}`` a line; an
    ``InputError`` names the file and the line."""
    prompts: list[str] = []
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        with _expected('{"prompt": "..."} or {"turns": ["..."]}', path, number):
            record = parse_json(line)
            prompt = record["prompt"] if "turns" not in record else list_of(record["turns"])[0]
            if not isinstance(prompt, str):
                raise TypeError
            # a JSON escape may be half a character
            prompt.encode()
        if not prompt.strip():
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
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        with _expected('{"prompt": index, "answer": [token ids]}', path, number):
            record = parse_json(line)
            index = whole_number(record["prompt"])
            answer = [whole_number(token) for token in list_of(record["answer"])]
        if not 0 <= index < len(prompts):
            raise InputError(f"{path}, line {number}: prompt {index} of {len(prompts)}, from 0")
        prompt = prompts[index]
        if not answer or max(answer) >= vocabulary or min(answer) < 0:
            raise InputError(f"{path}, line {number}: token ids outside the vocabulary, or none")
        examples.append(Example(prompt, answer, split_of(prompt)))
    return examples


def _lines(path: Path) -> list[str]:
    try:
        return read_lines(path)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as text ({error})") from error


@contextmanager
def _expected(form: str, path: Path, number: int) -> Iterator[None]:
    """Errors of reading a line's JSON become an ``InputError`` that shows its form."""
    try:
        yield
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise InputError(f"{path}, line {number}: expected {form}") from error


def split_of(prompt: Sequence[int]) -> str:
    """The split of a prompt, by a hash of its tokens."""
    fraction = int.from_bytes(_hash(prompt)[:4], "big") / 2**32
    return next(name for name, end in SPLITS if fraction < end)


def _hash(prompt: Sequence[int]) -> bytes:
    return hashlib.sha256(repr(list(prompt)).encode()).digest()


def write_prompts(
    loaded: LoadedModel, count: int, path: Path, progress: Progress
) -> list[list[int]]:
    """``count`` prompts that the model writes itself; those in ``path`` are not written again.

    After Magpie (Xu et al., 2024): a model that is tuned to answer users has learned to continue an
    empty user's turn with a plausible prompt.
    """
    opening, closing = loaded.turn()
    file = RecordFile(path)
    progress.begin("writing prompts", count)
    progress.advance(len(file.records))
    sampling = {"do_sample": True, "temperature": 1.0, "top_p": 0.95, "top_k": 0}
    while (left := count - len(file.records)) > 0:
        batch = [opening] * min(BATCH, left)
        written = _generated(loaded, batch, LONGEST_PROMPT, sampling)
        prompts = [[*opening, *row[: _length(row, loaded.stop)], *closing] for row in written]
        file.extend({"prompt": prompt} for prompt in prompts)
        progress.advance(len(prompts))
    return [record["prompt"] for record in file.records]


def write_answers(
    loaded: LoadedModel,
    prompts: Sequence[list[int]],
    tokens: int,
    path: Path,
    progress: Progress,
    temperature: float = 0.0,
) -> list[Example]:
    """About ``tokens`` tokens of the model's own answers, greedy or sampled at a ``temperature``;
    those in ``path`` are not generated again. Raises ``InputError`` for a prompt as long as the
    model's maximum length."""
    file = RecordFile(path)
    made = sum(len(record["answer"]) for record in file.records)
    progress.begin("generating answers", tokens)
    progress.advance(made)
    answered = {tuple(record["prompt"]) for record in file.records}
    left = [prompt for prompt in _mixed(prompts) if tuple(prompt) not in answered]
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    for begin in range(0, len(left), BATCH):
        if made >= tokens:
            break
        batch = left[begin : begin + BATCH]
        width = max(map(len, batch))
        refuse_longer(loaded.model, width + 1, "a prompt and its answer")
        room = usual_length(loaded.model, width + LONGEST_ANSWER) - width
        written = _generated(loaded, batch, room, sampling)
        # with its stop token
        answers = [row[: _length(row, loaded.stop) + 1] for row in written]
        pairs = zip(batch, answers, strict=True)
        file.extend({"prompt": prompt, "answer": answer} for prompt, answer in pairs)
        made += sum(map(len, answers))
        progress.advance(sum(map(len, answers)))
    return [Example(r["prompt"], r["answer"], split_of(r["prompt"])) for r in file.records]


def _mixed(prompts: Sequence[list[int]]) -> list[list[int]]:
    """``prompts`` in an order of their own, in which every stretch has its share of each split.

    So where the token limit ends this early, all kinds and all splits are there.
    """
    kinds: dict[str, list[list[int]]] = {}
    for prompt in sorted(prompts, key=_hash):
        kinds.setdefault(split_of(prompt), []).append(prompt)
    placed = [
        ((place + 0.5) / len(kind), name, prompt)
        for name, kind in kinds.items()
        for place, prompt in enumerate(kind)
    ]
    return [prompt for _, _, prompt in sorted(placed, key=lambda entry: entry[:2])]


@torch.no_grad()
def _generated(
    loaded: LoadedModel, batch: Sequence[list[int]], room: int, sampling: Mapping[str, Any]
) -> list[list[int]]:
    """Up to ``room`` tokens after each prompt of ``batch``, which is padded on the left."""
    stop = loaded.stop
    pad = min(stop, default=0)
    width = max(map(len, batch))
    output = loaded.model.generate(
        input_ids=torch.tensor([[pad] * (width - len(ids)) + ids for ids in batch]),
        attention_mask=torch.tensor([[0] * (width - len(i)) + [1] * len(i) for i in batch]),
        max_new_tokens=room,
        eos_token_id=sorted(stop) or None,
        pad_token_id=pad,
        **sampling,
    )
    written: list[list[int]] = output[:, width:].tolist()
    return written


def _length(tokens: Sequence[int], stop: frozenset[int]) -> int:
    """The number of tokens before the first stop token."""
    return next((i for i, token in enumerate(tokens) if token in stop), len(tokens))
