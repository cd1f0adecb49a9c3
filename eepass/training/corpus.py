"""Prompts and answers: read from files, and divided into what is trained and measured on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from eepass.errors import InputError
from eepass.reading import list_of, read_records, whole_number

# prompts whose kind of text is not known
GIVEN = "given"


class Prompt(NamedTuple):
    """The tokens of a prompt, the kind of text it asks for, and the split it belongs to."""

    ids: list[int]
    kind: str
    split: str


class Example(NamedTuple):
    """The tokens of a prompt and its answer, the split and the kind of the prompt, and whether the
    answer is greedy: then each of its tokens is the dense one."""

    prompt: list[int]
    answer: list[int]
    split: str
    kind: str = GIVEN
    greedy: bool = False


# by prompt, so that no prompt's answers are in two splits: the draft head and the translators are
# trained on the first, predictors on the second, thresholds on the third
SPLITS = (("fit", 0.80), ("predict", 0.92), ("calibrate", 1.0))
# kinds of text that nothing is trained on: the report's
HELD_OUT = "report"


def read_prompts(path: Path, limit: int | None = None) -> list[str]:
    """Prompts of a JSONL file: ``{"prompt": ...}`` or ``{"turns": [...]}`` a line; an
    ``InputError`` names the file and the line."""
    return [prompt for prompt, _ in read_kinds(path, limit)]


def read_kinds(path: Path, limit: int | None = None) -> list[tuple[str, str]]:
    """Prompts as ``read_prompts`` reads them, each with the ``"kind"`` of its line."""
    prompts: list[tuple[str, str]] = []
    form = '{"prompt": "..."} or {"turns": ["..."]}'
    for place, (prompt, kind) in read_records(path, form, _prompt_and_kind):
        if not prompt.strip():
            raise InputError(f"{place}: the prompt is empty")
        prompts.append((prompt, kind))
        if limit is not None and len(prompts) >= limit:
            break
    if not prompts:
        raise InputError(f"{path}: no prompts in it")
    return prompts


def _prompt_and_kind(record: Any) -> tuple[str, str]:
    prompt = record["prompt"] if "turns" not in record else list_of(record["turns"])[0]
    # a JSON escape may be half a character
    prompt.encode()
    kind = record.get("kind", GIVEN)
    if not isinstance(prompt, str) or not isinstance(kind, str):
        raise TypeError
    return prompt, kind


def read_answers(path: Path, prompts: Sequence[Prompt], vocabulary: int) -> list[Example]:
    """Examples of a JSONL file ``{"prompt": index, "answer": [token ids]}`` over ``prompts``."""
    examples = []
    form = '{"prompt": index, "answer": [token ids]}'
    for place, (index, answer) in read_records(path, form, _index_and_answer):
        if not 0 <= index < len(prompts):
            raise InputError(f"{place}: prompt {index} of {len(prompts)}, from 0")
        prompt = prompts[index]
        if not answer or max(answer) >= vocabulary or min(answer) < 0:
            raise InputError(f"{place}: token ids outside the vocabulary, or none")
        examples.append(Example(prompt.ids, answer, prompt.split, prompt.kind))
    return examples


def _index_and_answer(record: Any) -> tuple[int, list[int]]:
    answer = [whole_number(token) for token in list_of(record["answer"])]
    return whole_number(record["prompt"]), answer


def split_of(prompt: Sequence[int]) -> str:
    """The split of a prompt, by a hash of its tokens."""
    fraction = int.from_bytes(hash_of(prompt)[:4], "big") / 2**32
    return next(name for name, end in SPLITS if fraction < end)


def hash_of(prompt: Sequence[int]) -> bytes:
    return hashlib.sha256(repr(list(prompt)).encode()).digest()


def mixed(prompts: Sequence[Prompt]) -> list[Prompt]:
    """``prompts`` in an order of their own, in which every stretch has its share of each split.

    So where the token limit ends this early, all kinds and all splits are there.
    """
    splits: dict[str, list[Prompt]] = {}
    for prompt in sorted(prompts, key=lambda prompt: hash_of(prompt.ids)):
        splits.setdefault(prompt.split, []).append(prompt)
    placed = [
        ((place + 0.5) / len(split), name, prompt)
        for name, split in splits.items()
        for place, prompt in enumerate(split)
    ]
    return [prompt for _, _, prompt in sorted(placed, key=lambda entry: entry[:2])]
