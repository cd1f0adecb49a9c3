"""How a server listens, what it allows, and how long it waits."""

from __future__ import annotations

import ipaddress
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from math import isfinite
from pathlib import Path
from typing import Any, get_type_hints

from eepass.errors import InputError

# the least and the most of each number
BOUNDS: dict[str, tuple[float, float]] = {
    "port": (0, 65535),
    "cache_tokens": (64, 1 << 24),
    "max_prompt_tokens": (1, 1 << 24),
    "max_answer_tokens": (1, 1 << 24),
    "max_waiting": (1, 100_000),
    "max_connections": (1, 100_000),
    "max_body_bytes": (1024, 1 << 30),
    "at_once": (1, 100_000),
    "timeout": (0.001, 1e6),
    "slow_timeout": (0.001, 1e6),
    "stop_timeout": (0, 1e6),
}
LEVELS = ("debug", "info", "warning", "error")


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """Options of ``eepass.serve`` and ``eepass serve``; times in seconds.

    Raises ``InputError`` naming the option and its value.
    """

    host: str = "127.0.0.1"
    # 0 takes a free one
    port: int = 8000
    # the model's id for clients; by default the last part of what was loaded
    name: str | None = None
    # what clients send as "Authorization: Bearer KEY"
    api_key: str | None = field(default=None, repr=False)
    # names in the Host header beside localhost and the host listened at; "*" for any
    allow_host: tuple[str, ...] = ()
    # web pages that may ask, as "https://example.org"; "*" for any
    allow_origin: tuple[str, ...] = ()
    # room for the prompts and answers of all requests together
    cache_tokens: int = 16384
    # of one request; None is as many as the model or the cache has room for
    max_prompt_tokens: int | None = None
    max_answer_tokens: int = 2048
    # requests whose answer has not begun
    max_waiting: int = 64
    # requests that are decoded together; None is as many as there is room for
    at_once: int | None = None
    max_connections: int = 512
    max_body_bytes: int = 1 << 20
    # from a request's arrival to the end of its answer
    timeout: float = 600.0
    # to send a whole request, and to read on when nothing more can be sent
    slow_timeout: float = 10.0
    # for running answers to end, once the server is told to stop
    stop_timeout: float = 30.0
    # no drafts and no exits
    dense: bool = False
    # who drafts tokens, as in ExitConfig
    speculate: str = "cascade"
    # compute what prompts begin with in common once, and keep it for a while; how soon an answer
    # comes then tells whether somebody asked with the same beginning
    share_prefixes: bool = True
    # whether drafts may repeat earlier requests: only where these are all one user's
    remember: bool = False
    # compile before the first request, not at it
    warm_up: bool = True
    log_level: str = "error"

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for each in fields(self):
            value, hint = getattr(self, each.name), str(hints[each.name])
            if value is None and "None" in hint:
                continue
            if each.name in BOUNDS:
                self._check_number(each.name, value, whole="float" not in hint)
            elif hint.startswith("tuple"):
                if isinstance(value, str) or not all(isinstance(one, str) for one in value):
                    self._refuse(each.name, "a list of texts")
                object.__setattr__(self, each.name, tuple(value))
            elif not isinstance(value, bool if "bool" in hint else str):
                self._refuse(each.name, "true or false" if "bool" in hint else "a text")
        if self.log_level not in LEVELS:
            self._refuse("log_level", f"one of {', '.join(LEVELS)}")
        if self.api_key is not None and not (self.api_key and self.api_key.isascii()):
            raise InputError("api_key: must be a text of ASCII characters, and not empty")

    def _check_number(self, name: str, value: Any, whole: bool) -> None:
        least, most = BOUNDS[name]
        number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
        if not number or not isfinite(value) or not least <= value <= most:
            kind = "a whole number" if whole else "a number"
            self._refuse(name, f"{kind} from {least} to {most}")

    def _refuse(self, name: str, wanted: str) -> None:
        raise InputError(f"{name}={getattr(self, name)!r}: must be {wanted}")

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        address = _address(self.host)
        return self.host == "localhost" if address is None else address.is_loopback

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> ServerOptions:
        """From names and values; ``InputError`` naming one that there is not."""
        known = [each.name for each in fields(cls)]
        if unknown := sorted(set(values) - set(known)):
            raise InputError(f"{unknown[0]}: no option of the server; known: {', '.join(known)}")
        return cls(**values)


def read_options(file: Path) -> dict[str, Any]:
    """Names and values in a TOML file, "-" in names as "_"; ``InputError`` for what is none."""
    try:
        values = tomllib.loads(file.read_bytes().decode())
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: cannot be read as TOML ({error})") from error
    return {name.replace("-", "_"): value for name, value in values.items()}


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return None
