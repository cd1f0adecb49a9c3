"""Errors as clients see them: a status and OpenAI's error object."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic_core import to_json

KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class Refused(Exception):
    """A request that is not, or not wholly, answered: the sentence says why and what to do.

    ``param``: the field of the body that is wrong; ``code``: for programs.
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        usual = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = KINDS.get(self.status, usual)
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    @property
    def encoded(self) -> bytes:
        return to_json(self.body)


class ClientGone(Exception):
    """The client has hung up: there is nobody to answer."""
