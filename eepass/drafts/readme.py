"""The page that goes with an exported head: what it is, and the command that serves with it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from eepass.drafts.head_config import HeadConfig


def readme(
    model: str, format: str, config: HeadConfig, report: Mapping[str, Any], steps: int
) -> str:
    """Markdown for a head for ``model``; ``report``: the artefact's."""
    speculative = json.dumps({"method": "eagle3", "model": "DIR", "num_speculative_tokens": steps})
    layers = ", ".join(map(str, config.layers))
    command = f"vllm serve {model} --speculative-config '{speculative}'"
    parts = [
        f"# EAGLE-3 draft head for {model}",
        f"Drafts {config.draft_vocabulary} of {config.vocabulary} tokens from the hidden states "
        f"after layers {layers}. A wrong draft token costs time, never correctness.",
        f"With this folder as DIR:\n\n```\n{command}\n```",
    ]
    if format == "speculators":
        parts.append("Or, since the folder names its model:\n\n```\nvllm serve DIR\n```")
    parts.append(_acceptance(report))
    if config.norm_before_residual or config.norm_output or config.fc_norm:
        parts.append(
            "The head needs a server that knows `norm_before_residual`, `fc_norm` and "
            "`norm_output`, as vLLM 0.32 does. Others may load it and leave one of them "
            "out: the text stays right, and fewer draft tokens are accepted."
        )
    if config.window:
        parts.append(f"Its attention sees the last {config.window} tokens.")
    return "\n\n".join(part for part in parts if part) + "\n"


def _acceptance(report: Mapping[str, Any]) -> str:
    """How far drafts were accepted, by kind of text, where the report says it."""
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
