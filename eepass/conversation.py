"""A conversation with a model: its turns as one prompt, the answers as text, what these took."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import NamedTuple

from eepass.checkpoints.models import LoadedModel
from eepass.checkpoints.text_stream import TextStream
from eepass.errors import InputError
from eepass.model import EarlyExitModel
from eepass.runtime.engine.batch import Request
from eepass.runtime.sampling import GREEDY, Sampling

# the part of the room that an answer has at least, and that is freed with each forgetting: the
# engine keeps what a conversation begins with, which is of use until the beginning changes
PART = 4


class Turn(NamedTuple):
    question: str
    answer: str


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast answers came: of their ``tokens``, those ``following`` a first one, which comes from
    the prompt, took so many ``passes`` and ``seconds``."""

    tokens: int = 0
    following: int = 0
    passes: int = 0
    seconds: float = 0.0

    def __add__(self, other: Pace) -> Pace:
        return Pace(
            self.tokens + other.tokens, self.following + other.following,
            self.passes + other.passes, self.seconds + other.seconds,
        )  # fmt: skip

    @property
    def accepted_per_pass(self) -> float:
        return self.following / max(self.passes, 1)

    @property
    def tokens_per_second(self) -> float:
        return self.following / (self.seconds or inf)


class Conversation:
    """Turns with the model of ``loaded``, decoded by ``model`` in answers of at most
    ``new_tokens``.

    With ``raw``, or without a chat template, it is one text: each question follows in a new line.
    """

    def __init__(
        self, loaded: LoadedModel, model: EarlyExitModel, new_tokens: int,
        sampling: Sampling = GREEDY, raw: bool = False,
    ) -> None:  # fmt: skip
        self._loaded, self._model = loaded, model
        self._new_tokens, self._sampling = new_tokens, sampling
        self.room = model.decoder.max_sequence_length
        self.templated = loaded.converses and not raw
        self.system = ""
        self.turns: list[Turn] = []
        # how many turns the last question made it forget, for want of room
        self.forgotten = 0
        # whether the last answer was as long as it may be
        self.cut = False
        self.last, self.all = Pace(), Pace()

    def ask(self, question: str) -> Generator[str, None, None]:
        """The answer, piece by piece. Closed early, it ends within a pass, and what was said so
        far stays in the conversation; a question that got no answer does not.

        Raises ``InputError`` for a question that has no room.
        """
        ids = self._prompt(question)
        limit = min(self._new_tokens, self.room - len(ids))
        request = Request(ids, limit, self._loaded.stop, self._sampling, shares=True)
        return self._answer(question, request)

    def instruct(self, system: str) -> None:
        """Begin prompts with this system message, "" for none; ``InputError`` where the model
        takes none."""
        if system:
            if not self.templated:
                raise InputError("a system message wants a chat template: put it into the text")
            self._loaded.encode_messages(_messages(system, [], "?"))
        self.system = system

    def clear(self) -> None:
        """Forget all turns, but not the system message."""
        self.turns.clear()
        self.last = self.all = Pace()

    def _answer(self, question: str, request: Request) -> Generator[str, None, None]:
        decode = partial(self._loaded.tokenizer.decode, skip_special_tokens=True)
        stream, said, count, ended = TextStream(decode), list[str](), 0, False
        statistics, self.cut = self._model.statistics, False
        passes, seconds = statistics.passes, statistics.seconds
        tokens = self._model.loop.submit([request])
        try:
            for _, token in tokens:
                count, ended = count + 1, token in request.stop
                if not ended:
                    said.append(stream.add(token))
                    yield said[-1]
            self.cut = not ended
            said.append(stream.rest())
            yield said[-1]
        finally:
            if answer := "".join(said):
                self.turns.append(Turn(question, answer))
            # waits for the end of a pass
            tokens.close()
            if count:
                self.last = Pace(
                    count, count - 1, statistics.passes - passes, statistics.seconds - seconds
                )
                self.all += self.last

    def _prompt(self, question: str) -> list[int]:
        """Token ids of the conversation and ``question``, without the oldest turns if there is no
        room for them."""
        part = self.room // PART
        turns, most = self.turns, self.room - min(self._new_tokens, part)
        ids = self._encode(turns, question)
        if len(ids) > most:
            while turns and len(ids) > most - part:
                turns = turns[1:]
                ids = self._encode(turns, question)
        if len(ids) >= self.room:
            raise InputError(
                f"this message takes {len(ids)} tokens, and there is room for {self.room}: "
                "shorten it, or start with a larger --max-length"
            )
        self.forgotten = len(self.turns) - len(turns)
        self.turns = turns
        return ids

    def _encode(self, turns: Sequence[Turn], question: str) -> list[int]:
        if self.templated:
            return self._loaded.encode_messages(_messages(self.system, turns, question))
        before = "".join(f"{turn.question}{turn.answer}\n" for turn in turns)
        return self._loaded.encode(before + question, raw=True)


def _messages(system: str, turns: Sequence[Turn], question: str) -> list[dict[str, str]]:
    said = [("system", system)] if system else []
    for turn in turns:
        said += [("user", turn.question), ("assistant", turn.answer)]
    return [{"role": role, "content": text} for role, text in [*said, ("user", question)]]
