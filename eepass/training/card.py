"""The page that goes with an artefact: model, data, acceptance by kind of text, versions, licence.

Its head is what a hub reads of a README.md.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from eepass import __version__
from eepass.checkpoints.artifact import Artifact
from eepass.checkpoints.gguf_file import read_header
from eepass.checkpoints.models import LoadedModel, gguf_of
from eepass.errors import InputError
from eepass.files import write_text_atomically

CARD = "README.md"
# what the head of a model's own card, between two lines of dashes, says of its licence
HEAD = re.compile(r"---\n(.*?)\n---\n", re.DOTALL)
LICENCE = re.compile(r"^license: *[\"']?([\w.-]+)[\"']? *$", re.MULTILINE)


def write_card(folder: Path, loaded: LoadedModel, artifact: Artifact) -> None:
    """Write ``folder/README.md`` anew; raises ``OSError`` where the system refuses."""
    write_text_atomically(folder / CARD, card(loaded, artifact))


def card(loaded: LoadedModel, artifact: Artifact) -> str:
    """The card of ``artifact``, in Markdown; of a model on this machine it names no path."""
    here = loaded.name == "smollm2" or Path(loaded.name).exists()
    name = Path(loaded.name).stem if loaded.name.endswith(".gguf") else loaded.name
    name = Path(name).name if here else name
    licence = licence_of(loaded.name)
    head = ["library_name: eepass", "tags: [speculative-decoding, early-exit]"]
    head += [f"license: {licence}"] if licence else []
    head += [] if here else [f"base_model: {json.dumps(name)}"]
    of, report = artifact.fingerprint, artifact.report
    parts = [
        "---\n" + "\n".join(head) + "\n---",
        f"# Drafts and exits for {name}",
        "Safetensors and JSON, for eepass. With this folder as DIR, or its id on a hub:"
        f'\n\n```\neepass generate {name} --artifact DIR --prompt "Why is the sea salty?"\n```',
        "\n".join([
            "| | |", "|---|---|",
            f"| model | {of['architecture']}, {of['layers']} layers of {of['hidden']}, "
            f"{of['vocabulary']} tokens, weights `{of['weights']}` |",
            f"| holds | {_contents(artifact)} |",
            f"| data | {_data(report)} |",
            f"| versions | {_versions()} |",
            f"| licence | {_licence(licence)} |",
        ]),
        acceptance_table(report),
        _thresholds(artifact),
    ]  # fmt: skip
    return "\n\n".join(part for part in parts if part) + "\n"


def licence_of(name: str) -> str:
    """The licence that the model ``name`` on this machine states, in its GGUF file or at the head
    of its README.md; empty where it states none."""
    if name == "smollm2" or name.endswith(".gguf"):
        try:
            stated = read_header(gguf_of(name)).fields.get("general.license")
        except InputError:
            return ""
        return stated if isinstance(stated, str) and LICENCE.match(f"license: {stated}") else ""
    try:
        text = (Path(name) / CARD).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""
    head = HEAD.match(text)
    found = head and LICENCE.search(head[1])
    return found[1] if found else ""


def acceptance_table(report: Mapping[str, Any]) -> str:
    """How far drafts were accepted, by kind of text, where an artefact's report says it."""
    by_kind = report.get("by_kind")
    kinds = by_kind.get("kinds") if isinstance(by_kind, Mapping) else None
    if not isinstance(kinds, Mapping) or not kinds:
        return ""
    rows = [
        f"| {name} | {' | '.join(f'{share:.2f}' for share in kind['accepted'])} "
        f"| {kind['a_pass']:.2f} |"
        for name, kind in kinds.items()
    ]
    steps = max(len(kind["accepted"]) for kind in kinds.values())
    heads = " | ".join(f"draft {n}" for n in range(1, steps + 1))
    return "\n".join([
        "Share of draft tokens accepted, given those before, in a chain:\n",
        f"| kind | {heads} | tokens a pass |",
        "|---" * (steps + 2) + "|",
        *rows,
    ])  # fmt: skip


def _contents(artifact: Artifact) -> str:
    head = ["a draft head"] if any(n.startswith("eagle.") for n in artifact.tensors) else []
    exits = [f"exits for the preset {name}" for name in artifact.presets]
    return ", ".join(head + exits)


def _data(report: Mapping[str, Any]) -> str:
    said = []
    if isinstance(tokens := report.get("tokens"), Mapping):
        shares = ", ".join(f"{count:,} ({split})" for split, count in tokens.items())
        said.append(f"{report.get('examples', 0):,} of the model's own answers, tokens {shares}")
    if isinstance(kinds := report.get("kinds"), Mapping) and kinds:
        said.append("answers by kind: " + ", ".join(f"{n} {count}" for n, count in kinds.items()))
    if "recalibrated" in report:
        said.append("thresholds set anew (`eepass calibrate`)")
    if "config" in report.get("draft_head", {}):
        said.append("draft head trained elsewhere (`eepass import-draft`)")
    return "; ".join(said) or "not stated"


def _versions() -> str:
    import torch
    import transformers

    return (
        f"eepass {__version__}, torch {torch.__version__}, transformers {transformers.__version__}"
    )


def _licence(stated: str) -> str:
    if stated:
        return f"the model's: {stated}"
    return "the model states none: say here what its licence and that of the data ask for"


def _thresholds(artifact: Artifact) -> str:
    rows = list(_rows(artifact))
    if not rows:
        return ""
    return "\n".join([
        "Exits, on held-out answers; thresholds hold for these weights alone:\n",
        "| preset | target | agreement | mean exit layer |", "|---|---|---|---|", *rows,
    ])  # fmt: skip


def _rows(artifact: Artifact) -> Iterator[str]:
    for name, part in artifact.presets.items():
        for found in part.calibrations:
            yield (
                f"| {name} | {found.target} | {found.agreement:.3f} | {found.mean_exit_layer:.1f} |"
            )
