"""Compiled kernels as files: one ``.cubin`` a kernel, and ``kernels.json`` that describes them.

Reading checks, without Triton and without a GPU, that they were compiled for this GPU, from these
sources, and are unaltered.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eepass.reading import parse_json

INDEX = "kernels.json"
AGAIN = "compile them again: eepass codegen MODEL --target {target} --out FOLDER"


class KernelsUnfit(ValueError):
    """Compiled kernels that cannot be used here; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class StoredKernel:
    """Machine code of a kernel: its entry, ``parameters`` as PTX declares them, warps a program."""

    name: str
    parameters: tuple[str, ...]
    warps: int
    shared_bytes: int
    code: bytes


@dataclass(frozen=True, slots=True)
class Cubin(StoredKernel):
    """A kernel as it was compiled: ``registers`` a thread, ``spills`` in bytes; launches with the
    same ``key`` share it."""

    key: str
    registers: int
    spills: int


def target_name(capability: int) -> str:
    return f"sm_{capability}"


def write_kernels(
    folder: Path,
    capability: int,
    compiled: Iterable[Cubin],
    sources: Mapping[str, str],
    report: Mapping[str, Any],
) -> None:
    """Write ``compiled`` and their index; ``sources``: by entry, a hash of the kernel's source;
    ``report``: further fields of the index, for human readers."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = {}
    for kernel in compiled:
        (folder / f"{kernel.key}.cubin").write_bytes(kernel.code)
        entries[kernel.key] = {
            "entry": kernel.name,
            "parameters": list(kernel.parameters),
            "warps": kernel.warps,
            "shared_bytes": kernel.shared_bytes,
            "sha256": hashlib.sha256(kernel.code).hexdigest(),
        }
    index = {**report, "capability": capability, "sources": dict(sources), "cubins": entries}
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def read_kernels(
    folder: Path, capability: int, sources: Mapping[str, str]
) -> tuple[int, dict[str, StoredKernel]]:
    """The capability the kernels of ``folder`` were compiled for, and the kernels by key.

    ``capability`` is that of the GPU they are to run on, ``sources`` the hashes of this version's
    kernels. Raises ``KernelsUnfit`` for another GPU, other sources, or damaged files.
    """
    path = folder / INDEX
    try:
        index = parse_json(path.read_bytes())
        own, entries, stored_sources = index["capability"], index["cubins"], index["sources"]
        again = AGAIN.format(target=target_name(capability))
        if not runs_on(own, capability):
            raise KernelsUnfit(
                f"{path}: compiled for {target_name(own)}, this GPU is {target_name(capability)}; "
                + again
            )
        found = {}
        for key, entry in entries.items():
            name = entry["entry"]
            if stored_sources[name] != sources.get(name):
                raise KernelsUnfit(f"{path}: {name} has another source than here; {again}")
            found[key] = StoredKernel(
                name, tuple(entry["parameters"]), entry["warps"], entry["shared_bytes"],
                _code(folder / f"{key}.cubin", entry["sha256"]),
            )  # fmt: skip
    except OSError as error:
        raise KernelsUnfit(f"{error.filename}: missing or unreadable ({error.strerror})") from error
    except KernelsUnfit:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise KernelsUnfit(f"{path}: damaged, {error} is missing or wrong") from error
    return own, found


def best_folder(home: Path, capability: int) -> Path:
    """Of the folders ``home``/sm_NN the one whose kernels run on ``capability``, the latest if
    several do; if none does, ``KernelsUnfit`` lists what there is."""
    found = sorted(int(path.name[3:]) for path in home.glob("sm_[0-9]*") if path.is_dir())
    fitting = [target for target in found if runs_on(target, capability)]
    if not fitting:
        available = ", ".join(map(target_name, found)) or "none"
        raise KernelsUnfit(
            f"{home}: no kernels for this GPU ({target_name(capability)}), but for {available}; "
            f"give eepass transform --gpu {target_name(capability)}"
        )
    return home / target_name(fitting[-1])


def runs_on(compiled: int, capability: int) -> bool:
    """Whether code for compute capability ``compiled`` runs on ``capability``.

    It does on the same or a later one of the same generation; from 9.0 on Triton compiles for
    exactly one (``sm_90a``).
    """
    if compiled >= 90:
        return compiled == capability
    return compiled // 10 == capability // 10 and compiled <= capability


def _code(path: Path, digest: str) -> bytes:
    code = path.read_bytes()
    if hashlib.sha256(code).hexdigest() != digest:
        raise KernelsUnfit(f"{path}: altered since it was written")
    return code
