"""Keep how often a model's draft tokens were accepted, so that the next process starts with it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import isfinite
from time import monotonic
from typing import Any

from eepass.kept.splits import kept_entries
from eepass.reading import number, parse_json
from eepass.runtime.drafting.acceptance import Bin
from eepass.runtime.drafting.planner import Planner

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

    def recall(self, planner: Planner) -> None:
        """Let ``planner`` start with what was learned; something damaged is ignored as a whole."""
        entry = self._entries.find(self._key) if self._key else None
        if entry is None:
            return
        try:
            found = parse_json((entry / ACCEPTANCE).read_bytes())
            bins, asked = _bins(found["bins"]), _numbers(found["asked"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return
        planner.acceptance.observed = bins
        planner.recall(asked)

    def keep(self, planner: Planner) -> None:
        """Write what ``planner`` has learned, if there is something new."""
        now = monotonic()
        if not self._key or planner.passes - self._passes < LEAST_PASSES:
            return
        if now - self._written < PAUSE:
            return
        self._passes, self._written = planner.passes, now
        observed = planner.acceptance.observed
        fullest = sorted(observed, key=lambda bin: -observed[bin][1])[:MOST_BINS]
        learned = {
            "bins": {",".join(map(str, bin)): observed[bin] for bin in fullest},
            "asked": planner.learned(),
        }
        self._entries.drop(self._key)
        # another process may have been faster; then its file stays
        self._entries.write(self._key, {ACCEPTANCE: json.dumps(learned).encode()})


def _bins(found: Mapping[str, Sequence[Any]]) -> dict[Bin, tuple[float, float]]:
    bins = {}
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
