"""Keep how often a model's draft tokens were accepted, so that the next process starts with it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import isfinite
from time import monotonic
from typing import Any

from eepass.kept.splits import kept_entries
from eepass.reading import number, parse_json

# by bin of draft tokens, how many were accepted and how many verified
Bins = dict[tuple[int, ...], tuple[float, float]]
ACCEPTANCE = "acceptance.json"
# bins of one model, parts of a bin's name, and observations that one counts for when it is read:
# another text may be another matter
MOST_BINS, MOST_PARTS, MOST_COUNTED = 2000, 8, 50.0
# it is written after an answer of so many passes, and no more often than in so many seconds
LEAST_PASSES, PAUSE = 16, 5.0


class KeptAcceptance:
    """That of the model whose splits are kept under ``key``, with the artefact that ``trained``
    names; "" for a model of which nothing is kept."""

    def __init__(self, key: str, trained: str = "") -> None:
        self._entries, self._key = kept_entries(), key and f"acceptance-{key}-{trained or 'none'}"
        self._passes, self._written = 0, -PAUSE

    def recall(self) -> tuple[Bins, list[float]]:
        """What was learned: bins, and what a planner has ``learned`` beside them; something damaged
        is ignored as a whole."""
        entry = self._entries.find(self._key) if self._key else None
        if entry is None:
            return {}, []
        try:
            found = parse_json((entry / ACCEPTANCE).read_bytes())
            return _bins(found["bins"]), _numbers(found["learned"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}, []

    def keep(self, passes: int, observed: Bins, learned: Sequence[float]) -> None:
        """Write what was learned in ``passes`` of this process, if there is something new."""
        now = monotonic()
        if not self._key or passes - self._passes < LEAST_PASSES or now - self._written < PAUSE:
            return
        self._passes, self._written = passes, now
        fullest = sorted(observed, key=lambda bin: -observed[bin][1])[:MOST_BINS]
        found = {
            "bins": {",".join(map(str, bin)): observed[bin] for bin in fullest},
            "learned": list(learned),
        }
        self._entries.replace(self._key, {ACCEPTANCE: json.dumps(found).encode()})


def _bins(found: Mapping[str, Sequence[Any]]) -> Bins:
    bins: Bins = {}
    for name, counts in list(found.items())[:MOST_BINS]:
        bin = tuple(map(int, name.split(",")))
        hits, verified = map(number, counts)
        if len(bin) > MOST_PARTS or not 0 <= hits <= verified or not isfinite(verified):
            raise ValueError(f"bin {name}: {counts}")
        share = min(MOST_COUNTED / verified, 1.0) if verified else 1.0
        bins[bin] = (hits * share, verified * share)
    return bins


def _numbers(found: Sequence[Any]) -> list[float]:
    values = [float(number(value)) for value in found]
    if not all(map(isfinite, values)):
        raise ValueError(f"{found}")
    return values
