"""Figures of a running server in Prometheus' text form."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client import generate_latest as generate
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from eepass.server.records import Record
from eepass.server.served import ServedModel

FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
EACH = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1)
TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """Counts of one server; ``text`` is what ``/metrics`` answers."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self._requests = Counter(
            "eepass_requests", "Requests by route and status.", ["route", "status"],
            registry=registry,
        )  # fmt: skip
        self._prompt = Counter("eepass_prompt_tokens", "Tokens of prompts.", registry=registry)
        self._answer = Counter("eepass_answer_tokens", "Tokens of answers.", registry=registry)
        self._first = Histogram(
            "eepass_time_to_first_token_seconds", "From a request's arrival to its first token.",
            buckets=FIRST, registry=registry,
        )  # fmt: skip
        self._each = Histogram(
            "eepass_time_per_token_seconds", "Between tokens after the first, by request.",
            buckets=EACH, registry=registry,
        )  # fmt: skip

    def count(self, record: Record) -> None:
        """Count a request that has ended."""
        self._requests.labels(record.route, str(record.status)).inc()
        self._prompt.inc(record.prompt_tokens)
        self._answer.inc(record.answer_tokens)
        if (first := record.first_token_seconds) is not None:
            self._first.observe(first)
        if (each := record.seconds_per_token) is not None:
            self._each.observe(each)

    def watch(self, service: Any, model: ServedModel) -> None:
        """Also tell what ``service`` and the engine of ``model`` are at when they are asked."""
        self.registry.register(_Now(service, model))

    def text(self) -> bytes:
        return generate(self.registry)


class _Now:
    """Collects what is read from the engine, rather than counted here."""

    def __init__(self, service: Any, model: ServedModel) -> None:
        self.service, self.model = service, model

    def describe(self) -> list[Metric]:
        """Nothing beforehand: the engine is not asked before it is there."""
        return []

    def collect(self) -> Iterator[Metric]:
        transformed = self.model.current()
        loop, statistics = transformed.loop, transformed.statistics
        state, waiting = loop.state(), self.service.waiting
        running = len(self.service.tickets) - waiting
        yield GaugeMetricFamily("eepass_running", "Answers that have begun.", running)
        yield GaugeMetricFamily("eepass_waiting", "Requests without a token yet.", waiting)
        slots = "Slots of the cache, one a token."
        yield GaugeMetricFamily("eepass_cache_slots", slots, state.slots)
        yield GaugeMetricFamily("eepass_cache_slots_used", "Of these, in use.", state.slots_used)
        kept = "More, with beginnings of prompts kept for others."
        yield GaugeMetricFamily("eepass_cache_slots_kept", kept, state.slots_kept)
        yield CounterMetricFamily("eepass_passes", "Passes of the engine.", statistics.passes)
        yield CounterMetricFamily("eepass_decoded_tokens", "Tokens of those.", statistics.tokens)
        each = statistics.tokens / max(statistics.passes, 1)
        yield GaugeMetricFamily("eepass_tokens_per_pass", "Accepted tokens a pass.", each)
        decision: Any = loop.engine.planner.decision(max(state.running, 1))
        mode = GaugeMetricFamily(
            "eepass_mode", "1 for the way of decoding in use.", labels=["mode"]
        )
        for name in decision["modes"]:
            mode.add_metric([name], float(name == decision["mode"]))
        yield mode
