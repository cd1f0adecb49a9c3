"""Sends requests to an OpenAI-compatible server and notes when each piece of an answer comes.

    python -m benchmarks.under_load.client < ORDER.json > ANSWERS.json

In a process of its own that loads no model, so that it takes little of the processor from the
server; ``cpu`` says how much. An order is what ``work.draw_order`` makes, with ``url``, ``model``
and ``extra`` (more fields of each request). What comes in is parsed when all has been measured.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from time import perf_counter, process_time
from typing import Any

import httpx2

from benchmarks.under_load.work import Answer, Request

# seconds without a byte before a request is given up: under load others stand before it
SILENCE, CONNECTING = 600, 30
# seconds a client waits after it was refused
BACK_OFF = 0.1
# characters of a failure's reason that are kept
REASON = 200
# asked before the clock starts: a server that was stopped finds its caches cold
LEAD_IN = Request("Say hello.", 8)


@dataclass(frozen=True, slots=True)
class Exchange:
    """A request and the lines that came back, each with its moment."""

    index: int
    asked: int
    sent: float
    ended: float
    lines: list[tuple[float, str]]
    failure: str


class Client:
    """Requests to one server; ``exchanges`` has them in the order in which they ended."""

    def __init__(self, http: httpx2.AsyncClient, order: Mapping[str, Any]) -> None:
        self.http, self.order = http, order
        self.requests = [Request(**request) for request in order["requests"]]
        self.exchanges: list[Exchange] = []
        self.began = perf_counter()

    @property
    def now(self) -> float:
        return perf_counter() - self.began

    async def run(self) -> float:
        """Send all there is to send; seconds in which the rates of the load are to be read."""
        await self.ask(-1, LEAD_IN)
        self.exchanges.clear()
        self.began = perf_counter()
        if arrivals := self.order["arrivals"]:
            return await self.as_they_arrive(arrivals)
        waiting = iter(enumerate(self.requests))
        loops = [self.closed_loop(waiting) for _ in range(self.order["clients"])]
        return min(await asyncio.gather(*loops))

    async def closed_loop(self, waiting: Iterator[tuple[int, Request]]) -> float:
        """One request after another; when there was nothing more to send."""
        seconds = self.order["seconds"]
        for index, request in waiting:
            if (await self.ask(index, request)).failure:
                await asyncio.sleep(BACK_OFF)
            if seconds is not None and self.now >= seconds:
                break
        return self.now

    async def as_they_arrive(self, arrivals: Sequence[float]) -> float:
        """Each request at its moment; when all were answered."""
        asked = []
        for index, (moment, request) in enumerate(zip(arrivals, self.requests, strict=True)):
            await asyncio.sleep(moment - self.now)
            asked.append(asyncio.create_task(self.ask(index, request)))
        await asyncio.gather(*asked)
        return self.now

    async def ask(self, index: int, request: Request) -> Exchange:
        body = {
            "model": self.order["model"],
            "messages": [{"role": "user", "content": request.prompt}],
            "max_tokens": request.max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self.order["extra"],
        }
        sent, failure = self.now, ""
        lines: list[tuple[float, str]] = []
        try:
            async with self.http.stream("POST", self.order["url"], json=body) as response:
                async for line in response.aiter_lines():
                    lines.append((self.now, line))
            if response.status_code != 200:
                failure = f"status {response.status_code}: {' '.join(text for _, text in lines)}"
        except httpx2.HTTPError as error:
            failure = f"{type(error).__name__}: {error}"
        found = Exchange(index, request.max_tokens, sent, self.now, lines, failure)
        self.exchanges.append(found)
        return found


def parsed(exchange: Exchange) -> Answer:
    """What the events of an exchange say."""
    chunks: list[tuple[float, str]] = []
    usage, finished, failure = None, False, exchange.failure
    for moment, line in exchange.lines:
        data = line.removeprefix("data:").strip()
        if not line.startswith("data:") or data == "[DONE]":
            continue
        event = json.loads(data)
        if "error" in event:
            failure = failure or str(event["error"])
        usage = event.get("usage") or usage
        for choice in event.get("choices", ()):
            if text := choice["delta"].get("content"):
                chunks.append((moment, text))
            finished = finished or choice.get("finish_reason") is not None
    if not finished:
        failure = failure or "the answer broke off"
    counts = usage or {"completion_tokens": len(chunks), "prompt_tokens": 0}
    return Answer(
        exchange.index, exchange.asked, exchange.sent, exchange.ended, chunks,
        counts["completion_tokens"], usage is not None, counts["prompt_tokens"], failure[:REASON],
    )  # fmt: skip


async def carry_out(order: Mapping[str, Any]) -> dict[str, Any]:
    """The answers to an order, ``window``: seconds in which rates are to be read, and ``cpu``: the
    share of one core that this process took."""
    timeout = httpx2.Timeout(SILENCE, connect=CONNECTING)
    # a connection for each request: a server may close one that it kept just when it is used again
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx2.AsyncClient(timeout=timeout, limits=limits, trust_env=False) as http:
        client = Client(http, order)
        used = process_time()
        window = await client.run()
        cpu = (process_time() - used) / client.now
    answers = sorted(map(parsed, client.exchanges), key=lambda answer: answer.index)
    return {"window": window, "cpu": cpu, "answers": [asdict(answer) for answer in answers]}


if __name__ == "__main__":
    json.dump(asyncio.run(carry_out(json.load(sys.stdin))), sys.stdout)
