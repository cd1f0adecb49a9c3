"""Servers that speak OpenAI's protocol, each in processes of its own on a free port.

A server that is not being measured is stopped (SIGSTOP), so that threads of it that spin or tidy up
take nothing from the one that is.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import httpx2

from eepass.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
# seconds to load a model and compile it, and to stop
STARTING, STOPPING = 900, 30
# stands for the port in a command
PORT = "{port}"
CHAT = "/v1/chat/completions"
# an answer of the length asked for, where a server can; sent where it is not refused
IGNORE_END = {"ignore_eos": True}


@dataclass(frozen=True, slots=True)
class System:
    """A server's command line, in which ``{port}`` stands for the port; fields that each of its
    requests needs, and its environment beside this process's own."""

    name: str
    command: Sequence[str]
    extra: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> System:
        """Of ``NAME=COMMAND``; ``InputError`` where that is not its form."""
        name, _, command = text.partition("=")
        if not name or PORT not in command:
            raise InputError(f"--server {text!r}: expected NAME=COMMAND with {PORT} in the command")
        return cls(name, shlex.split(command))


class Server:
    """A running server; ``model``: the id it gave its model, ``extra``: fields of each request."""

    def __init__(self, system: System, log: Path) -> None:
        self.name, self.log = system.name, log
        port = free_port()
        self.base = f"http://127.0.0.1:{port}"
        with log.open("wb") as output:
            try:
                self.process = subprocess.Popen(
                    [part.replace(PORT, str(port)) for part in system.command],
                    stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                    env={**os.environ, **system.environment}, start_new_session=True,
                )  # fmt: skip
            except OSError as error:
                raise InputError(f"{self.name}: {system.command[0]}: {error.strerror}") from error
        try:
            # a proxy of the environment is not for this machine
            limits = httpx2.Limits(max_keepalive_connections=0)
            with httpx2.Client(base_url=self.base, trust_env=False, limits=limits) as http:
                self.model = self._wait_until_ready(http)
                self.extra = {**system.extra, **self._ignoring_ends(http, system.extra)}
        except BaseException:
            # also on Ctrl-C: the process would go on alone
            self.stop()
            raise

    @property
    def url(self) -> str:
        return self.base + CHAT

    def _wait_until_ready(self, http: httpx2.Client) -> str:
        """The id of its model, once ``/health``, or ``/v1/models`` alone, is answered."""
        until = monotonic() + STARTING
        while monotonic() < until:
            self.refuse_ended()
            with contextlib.suppress(httpx2.HTTPError):
                health = http.get("/health")
                models = http.get("/v1/models")
                if health.status_code in (200, 404) and models.status_code == 200:
                    return str(models.json()["data"][0]["id"])
            sleep(0.2)
        raise InputError(f"{self.name}: not ready after {STARTING} s: {self.end}")

    def _ignoring_ends(self, http: httpx2.Client, extra: Mapping[str, Any]) -> Mapping[str, Any]:
        """The fields that let an answer be as long as asked for, where the server takes them."""
        body = {
            "model": self.model, "messages": [{"role": "user", "content": "Say hello."}],
            "max_tokens": 2, "temperature": 0, **extra,
        }  # fmt: skip
        try:
            for fields in (IGNORE_END, {}):
                answer = http.post(CHAT, json={**body, **fields}, timeout=STARTING)
                if answer.status_code == 200:
                    return fields
        except httpx2.HTTPError as error:
            raise InputError(f"{self.name}: no answer to a request ({error!r})") from error
        raise InputError(f"{self.name}: it refuses a plain request: {answer.text[:200]}")

    def refuse_ended(self) -> None:
        """Raise ``InputError`` if its process is no more."""
        if (status := self.process.poll()) is not None:
            raise InputError(f"{self.name}: its server ended with status {status}: {self.end}")

    @property
    def end(self) -> str:
        """The last line of what it printed."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")

    def pause(self) -> None:
        os.killpg(self.process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.killpg(self.process.pid, signal.SIGCONT)

    def forget_peak(self) -> None:
        """Let ``peak_mb`` begin anew, with what is held at this moment."""
        for process in self._processes():
            with contextlib.suppress(OSError):
                (process / "clear_refs").write_text("5")

    def peak_mb(self) -> float:
        """The most memory its processes held since ``forget_peak``, in MB; a page that two share
        counts twice."""
        found = 0.0
        for process in self._processes():
            # one of them may have ended
            with contextlib.suppress(OSError):
                for line in (process / "status").read_text().splitlines():
                    if line.startswith("VmHWM:"):
                        found += int(line.split()[1]) * 1024 / 1e6
        return found

    def _processes(self) -> list[Path]:
        """Folders in ``/proc`` of all processes of its session."""
        found = []
        for entry in Path("/proc").iterdir():
            # others end while this one looks
            with contextlib.suppress(ValueError, ProcessLookupError):
                if os.getsid(int(entry.name)) == self.process.pid:
                    found.append(entry)
        return found

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.resume()
            os.killpg(self.process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(STOPPING)
            # whatever of it has not ended by now
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextmanager
def running(system: System, folder: Path) -> Iterator[Server]:
    """``system``, ready and stopped until it is resumed; its log goes to ``folder``."""
    server = Server(system, folder / f"{system.name.replace(' ', '-').replace('/', '-')}.log")
    try:
        server.pause()
        yield server
    finally:
        server.stop()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])
