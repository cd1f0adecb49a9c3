"""The page that goes with an exported head: what it is, and the command that serves with it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from eepass.drafts.head_config import HeadConfig
from eepass.training.card import acceptance_table


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
    parts.append(acceptance_table(report))
    if config.norm_before_residual or config.norm_output or config.fc_norm:
        parts.append(
            "The head needs a server that knows `norm_before_residual`, `fc_norm` and "
            "`norm_output`, as vLLM 0.32 does. Others may load it and leave one of them "
            "out: the text stays right, and fewer draft tokens are accepted."
        )
    if config.window:
        parts.append(f"Its attention sees the last {config.window} tokens.")
    return "\n\n".join(part for part in parts if part) + "\n"
