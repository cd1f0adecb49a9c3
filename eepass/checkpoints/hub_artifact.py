"""Artefacts from a hub: ``org/name``, or ``org/name@revision``, through huggingface_hub's cache."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from eepass.errors import InputError, explained
from eepass.reading import parse_json

# as the hub has them: an owner, a name, and a branch, a tag or a commit
ID = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")


def is_hub_id(spec: str | Path) -> bool:
    """Whether ``spec`` names an artefact on the hub: it has the form of an id and is no folder."""
    return ID.fullmatch(str(spec)) is not None and not Path(spec).exists()


def fetch_artifact(
    spec: str | Path, manifest: str, usual: Sequence[str], ours: Callable[[str], bool]
) -> Path:
    """The folder in huggingface_hub's cache that holds the artefact ``spec``; its name is the
    commit that ``spec``'s revision stands for.

    The file ``manifest`` is fetched, and of that commit the files it lists, or ``usual`` where it
    has no list; what is in the cache is not fetched again, and with ``HF_HUB_OFFLINE=1`` nothing
    is. Raises ``InputError`` where the hub or the cache does not have them, and for a file that by
    its name is not one of ``ours``.
    """
    from huggingface_hub import constants, hf_hub_download

    found = ID.fullmatch(str(spec))
    assert found is not None
    name, revision = found["name"], found["revision"]
    missing = (
        f"{spec}: no such folder, and no such artefact from the hub; check the name, the "
        "revision, the access token and the network"
    )
    with explained(missing, Path(constants.HF_HUB_CACHE)):
        path = Path(hf_hub_download(name, manifest, revision=revision))
    commit = path.parent.name
    for file in _listed(path, usual):
        if not ours(file):
            raise InputError(f"{spec}: {manifest} lists {file!r}, which no artefact has")
        with explained(f"{spec}: {file} of its commit {commit} is not to be had"):
            hf_hub_download(name, file, revision=commit)
    return path.parent


def pinned(spec: str | Path, folder: Path) -> str:
    """``spec`` with the commit that was fetched to ``folder``."""
    return f"{str(spec).partition('@')[0]}@{folder.name}"


def _listed(manifest: Path, usual: Sequence[str]) -> Sequence[str]:
    """The files a manifest lists; whoever loads the artefact says what is wrong with one."""
    try:
        found = parse_json(manifest.read_bytes())
    except ValueError:
        return ()
    files = found.get("files", usual) if isinstance(found, dict) else ()
    return list(files) if isinstance(files, dict) else usual if files is usual else ()
