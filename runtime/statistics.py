"""Counts and times of an engine while it decodes."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(slots=True)
class Statistics:
    """Counts over the tokens decoded since the last reset; times in seconds.

    ``exit_layers[e]``: tokens that exited after e layers; ``wanted``: how often a predictor wanted
    to exit, ``refused``: how often verification then rejected it; ``rollbacks``: how often an exit
    turned out wrong; ``near_ties``: tokens whose two best logits differ by no more than the noise;
    ``full_heads``: rows of the LM head over the whole vocabulary.
    """

    num_layers: int
    tokens: int = 0
    passes: int = 0
    rollbacks: int = 0
    near_ties: int = 0
    exit_layers: list[int] = field(default_factory=list)
    predictors_run: int = 0
    wanted: int = 0
    refused: int = 0
    full_heads: int = 0
    rows_caught_up: int = 0
    draft_seconds: float = 0.0
    predictor_seconds: float = 0.0
    verify_seconds: float = 0.0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.exit_layers = self.exit_layers or [0] * (self.num_layers + 1)

    def record_exit(self, layer: int) -> None:
        self.tokens += 1
        self.exit_layers[layer] += 1

    @property
    def mean_exit_layer(self) -> float:
        total = sum(layer * count for layer, count in enumerate(self.exit_layers))
        return total / max(self.tokens, 1)

    def summary(self) -> dict[str, Any]:
        """Per-token figures; shares are fractions of the decoding time."""
        tokens, seconds = max(self.tokens, 1), self.seconds or float("nan")
        return {
            "tokens": self.tokens,
            "accepted_per_pass": self.tokens / max(self.passes, 1),
            "rollbacks": self.rollbacks,
            "near_ties": self.near_ties,
            "mean_exit_layer": self.mean_exit_layer,
            "exit_layers": list(self.exit_layers),
            "active_predictors": self.predictors_run / tokens,
            "false_verify_rate": self.refused / max(self.wanted, 1),
            "full_head_rate": self.full_heads / tokens,
            "draft_share": self.draft_seconds / seconds,
            "predictor_share": self.predictor_seconds / seconds,
            "verify_share": self.verify_seconds / seconds,
            "ms_per_token": 1e3 * self.seconds / tokens,
        }

    def add(self, other: Statistics) -> None:
        """Add another run's counts to these."""
        for name, value in asdict(other).items():
            if name == "exit_layers":
                pairs = zip(self.exit_layers, value, strict=True)
                self.exit_layers = [a + b for a, b in pairs]
            elif name != "num_layers":
                setattr(self, name, getattr(self, name) + value)
