"""What is known of each request afterwards: for the log and the metrics, never its text."""

from __future__ import annotations

import json
import logging
import secrets
import sys
from dataclasses import dataclass, field
from datetime import UTC, datetime
from time import perf_counter

logger = logging.getLogger("eepass.server")


@dataclass(slots=True)
class Record:
    """One request; times are of ``perf_counter``. ``route``: as it is defined, "other" for none."""

    method: str
    route: str = "other"
    id: str = field(default_factory=lambda: secrets.token_hex(8))
    began: float = field(default_factory=perf_counter)
    # 499: the client hung up
    status: int = 499
    code: str | None = None
    prompt_tokens: int = 0
    answer_tokens: int = 0
    first_token: float | None = None
    last_token: float | None = None

    def token(self) -> None:
        """Another token of an answer is there."""
        self.last_token = perf_counter()
        self.first_token = self.first_token or self.last_token
        self.answer_tokens += 1

    @property
    def first_token_seconds(self) -> float | None:
        return None if self.first_token is None else self.first_token - self.began

    @property
    def seconds_per_token(self) -> float | None:
        """Mean time between tokens after the first; of several choices, between those of any."""
        if self.first_token is None or self.last_token is None or self.answer_tokens < 2:
            return None
        return (self.last_token - self.first_token) / (self.answer_tokens - 1)

    def log(self) -> None:
        """One line of JSON."""
        seconds = perf_counter() - self.began
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "id": self.id, "method": self.method, "route": self.route, "status": self.status,
            "code": self.code, "prompt_tokens": self.prompt_tokens,
            "answer_tokens": self.answer_tokens, "seconds": round(seconds, 4),
            "first_token_seconds": _rounded(self.first_token_seconds),
            "seconds_per_token": _rounded(self.seconds_per_token),
        }  # fmt: skip
        logger.info(json.dumps({name: value for name, value in line.items() if value is not None}))


def log_to_stderr(level: str) -> None:
    """Show what the server logs from ``level`` on, unless the program has set up logging."""
    logger.setLevel(level.upper())
    if not logger.hasHandlers():
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
