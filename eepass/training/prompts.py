"""Prompts of many kinds that the model writes itself.

After Magpie (Xu et al., 2024): a model that is tuned to answer users has learned to continue an
empty user's turn with a plausible prompt. A short stem from a list of topics begins the turn, so
that all kinds of text come up; some kinds are held out, for the report.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from eepass.checkpoints.models import LoadedModel
from eepass.reading import parse_json, read_lines
from eepass.runtime.sampling import Sampling
from eepass.training.corpus import HELD_OUT, Example, Prompt, split_of
from eepass.training.near_duplicates import NearDuplicates
from eepass.training.progress import Progress, RecordFile
from eepass.training.writer import Task, Writer

TOPICS = Path(__file__).parents[1] / "data" / "topics.jsonl"
# begun in the middle of a conversation
FOLLOW_UP = "several turns"
LONGEST = 96
TEMPERATURES = (0.7, 1.0, 1.2)
TOP_P = 0.95
# prompts written for one that is kept, at most: a model may repeat itself
TRIES = 4


class Topic(NamedTuple):
    """How prompts of a kind begin; nothing is trained on those of a kind that is held out."""

    kind: str
    stems: list[str]
    held_out: bool


class _Start(NamedTuple):
    """A prompt to be written: the tokens before it, its beginning, its split (None: by its own
    tokens)."""

    before: list[int]
    stem: list[int]
    kind: str
    split: str | None


def topics() -> list[Topic]:
    """Those that eepass ships."""
    lines = [parse_json(line) for line in read_lines(TOPICS) if line]
    return [Topic(t["kind"], t["stems"], t.get("held_out", False)) for t in lines]


def write_prompts(
    writer: Writer, loaded: LoadedModel, count: int, path: Path, progress: Progress
) -> list[Prompt]:
    """``count`` prompts, as many of each kind; those in ``path`` are not written again."""
    opening, _ = loaded.turn()
    chosen = [topic for topic in topics() if topic.kind != FOLLOW_UP]

    def starts() -> Iterator[_Start]:
        for number in range(TRIES * count):
            turn, topic = number // len(chosen), chosen[number % len(chosen)]
            stem = _encode(loaded, topic.stems[turn % len(topic.stems)])
            yield _Start(opening, stem, topic.kind, HELD_OUT if topic.held_out else None)

    return _written(writer, loaded, starts(), count, path, progress, "writing prompts")


def write_follow_ups(
    writer: Writer,
    loaded: LoadedModel,
    examples: Sequence[Example],
    count: int,
    path: Path,
    progress: Progress,
) -> list[Prompt]:
    """``count`` prompts that go on where answers of ``examples`` end, each in the split of its
    example."""
    between = loaded.next_turn()
    stems = next(topic.stems for topic in topics() if topic.kind == FOLLOW_UP)
    room = writer.model.max_length // 2
    bases = [e for e in examples if e.split != HELD_OUT and len(e.prompt) + len(e.answer) < room]

    def starts() -> Iterator[_Start]:
        for number, base in enumerate(bases[: TRIES * count]):
            said = [token for token in base.answer if token not in loaded.stop]
            stem = _encode(loaded, stems[number % len(stems)])
            yield _Start([*base.prompt, *said, *between], stem, FOLLOW_UP, base.split)

    return _written(writer, loaded, starts(), count, path, progress, "writing further turns")


def _written(
    writer: Writer,
    loaded: LoadedModel,
    starts: Iterator[_Start],
    count: int,
    path: Path,
    progress: Progress,
    stage: str,
) -> list[Prompt]:
    """``starts`` finished by the model, but those that repeat another."""
    _, closing_turn = loaded.turn()
    file, seen = RecordFile(path), NearDuplicates()
    for record in file.records:
        seen.is_new(record["text"])
    progress.begin(stage, count)
    progress.advance(len(file.records))
    first = file.records[-1]["number"] + 1 if file.records else 0
    left = [start for number, start in enumerate(starts) if number >= first]
    tasks = (
        Task([*s.before, *s.stem], LONGEST, _sampling(number))
        for number, s in enumerate(left, first)
    )
    if len(file.records) < count:
        with closing(writer.write(tasks)) as written:
            for number, (start, (tokens, _)) in enumerate(zip(left, written, strict=False), first):
                own = [*start.stem, *(token for token in tokens if token not in loaded.stop)]
                text = loaded.tokenizer.decode(own)
                if not text.strip() or not seen.is_new(text):
                    continue
                ids = [*start.before, *own, *closing_turn]
                file.append(
                    {"prompt": ids, "kind": start.kind, "split": start.split or split_of(ids),
                     "text": text, "number": number}
                )  # fmt: skip
                progress.advance(1)
                if len(file.records) >= count:
                    break
    return [Prompt(r["prompt"], r["kind"], r["split"]) for r in file.records]


def _encode(loaded: LoadedModel, stem: str) -> list[int]:
    ids: list[int] = loaded.tokenizer.encode(stem, add_special_tokens=False) if stem else []
    return ids


def _sampling(number: int) -> Sampling:
    temperature = TEMPERATURES[number // 7 % len(TEMPERATURES)]
    return Sampling(temperature, top_p=TOP_P, seed=number)
