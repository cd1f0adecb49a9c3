"""A hub on this machine: repositories at their newest commit, and what files it was asked for."""

import hashlib
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

from huggingface_hub import constants


class Hub:
    """``repositories``: folders by id; ``asked``: method, id, revision and file of each request."""

    def __init__(self):
        self.repositories: dict[str, Path] = {}
        self.asked: list[tuple[str, str, str, str]] = []

    def commit(self, repository):
        """Another one whenever a file is."""
        folder = self.repositories[repository]
        held = [(file.name, file.read_bytes()) for file in sorted(folder.glob("*.*"))]
        return hashlib.sha1(repr(held).encode()).hexdigest()

    def answer(self, method, path):
        """Status, headers and body, as the hub resolves ``/org/name/resolve/revision/file``."""
        repository, _, rest = path.strip("/").partition("/resolve/")
        revision, _, name = rest.partition("/")
        if not name:
            return 404, {}, b""
        self.asked.append((method, repository, revision, name))
        folder = self.repositories.get(repository)
        if folder is None:
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        commit = self.commit(repository)
        if revision not in ("main", "v1", commit):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        if not (folder / name).is_file():
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, b""
        body = (folder / name).read_bytes()
        etag = f'"{hashlib.sha256(body).hexdigest()}"'
        return 200, {"X-Repo-Commit": commit, "ETag": etag}, body


@contextmanager
def local_hub(monkeypatch, cache):
    """A running ``Hub`` that huggingface_hub asks, with its files in ``cache``."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            status, headers, body = hub.answer(self.command, self.path)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
