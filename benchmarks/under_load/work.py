"""What a load test asks for and what comes back; requests are drawn with a seed, so that every
system gets the same ones in the same order."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import accumulate, islice, takewhile
from typing import Any

# tokens of a prompt's text and of its answer, both ends included
PROMPT_TOKENS, ANSWER_TOKENS = (20, 400), (64, 192)
# requests drawn for each second of a closed loop: more than any server here can answer
DRAWN_PER_SECOND = 20


@dataclass(frozen=True, slots=True)
class Load:
    """Either a closed loop of ``clients``, each of which sends its next request when the last one
    is answered, or Poisson arrivals at ``rate`` requests a second whatever is still waiting."""

    clients: int = 0
    rate: float = 0.0

    @property
    def name(self) -> str:
        return str(self.clients) if self.clients else f"{self.rate:g}/s"


@dataclass(frozen=True, slots=True)
class Request:
    prompt: str
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Answer:
    """What a server said to request ``index``; times are in seconds since the block began.

    ``chunks``: when each piece of text came, and the piece. ``tokens``: as the server counted them
    (``by_usage``), else one a chunk. ``failure``: why there is no whole answer, "" if there is one.
    """

    index: int
    asked: int
    sent: float
    ended: float
    chunks: list[tuple[float, str]]
    tokens: int
    by_usage: bool
    prompt_tokens: int
    failure: str

    @property
    def text(self) -> str:
        return "".join(piece for _, piece in self.chunks)


def draw_requests(
    texts: Sequence[Sequence[int]],
    decode: Callable[[Sequence[int]], str],
    number: int,
    rng: random.Random,
) -> list[Request]:
    """``number`` requests whose prompts are made of ``texts``, given as tokens.

    Texts drawn at random are joined until they are as long as wanted; of a longer one the end is
    kept, since that is where the question stands.
    """
    requests = []
    for _ in range(number):
        wanted, answer = rng.randint(*PROMPT_TOKENS), rng.randint(*ANSWER_TOKENS)
        ids: list[int] = []
        while len(ids) < wanted:
            ids = [*rng.choice(texts), *ids]
        # what is cut may begin within a character
        prompt = decode(ids[-wanted:]).strip("\ufffd").strip()
        requests.append(Request(prompt, answer))
    return requests


def draw_arrivals(
    rate: float, seconds: float | None, number: int | None, rng: random.Random
) -> list[float]:
    """Moments of Poisson arrivals at ``rate`` a second, the first at once: all within ``seconds``,
    or the first ``number``."""
    moments: Iterator[float] = accumulate(iter(partial(rng.expovariate, rate), None), initial=0.0)
    if seconds is not None:
        moments = takewhile(lambda moment: moment <= seconds, moments)
    return list(islice(moments, number))


def draw_order(
    load: Load,
    texts: Sequence[Sequence[int]],
    decode: Callable[[Sequence[int]], str],
    seconds: float | None,
    number: int | None,
    seed: str,
) -> dict[str, Any]:
    """What the client's process is to do in one block: requests, and when to send them."""
    rng = random.Random(seed)
    order: dict[str, Any] = {"clients": load.clients, "seconds": seconds, "arrivals": []}
    if load.rate:
        order["arrivals"] = draw_arrivals(load.rate, seconds, number, rng)
        number = len(order["arrivals"])
    elif number is None:
        assert seconds is not None
        number = load.clients + round(DRAWN_PER_SECOND * seconds)
    drawn = draw_requests(texts, decode, number, rng)
    return {**order, "requests": [asdict(request) for request in drawn]}
