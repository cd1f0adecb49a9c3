"""The exit rule (SpecEE, arXiv 2504.08850): which exits are evaluated, and when a token exits.

At an active exit point the predictor gives the probability that the draft tokens hold the answer.
Above the threshold the token *wants to exit*; verification then computes the logits of the hot (or
the whole) vocabulary, and the token *exits* if their argmax is among the draft tokens. Every
executor decides by these functions: the engine on the host, the captured step on the device, and
the exit graph that ``torch.export`` and ONNX take.
"""

from __future__ import annotations

from torch import Tensor

# the scheduler keeps the exits near the exit layers of the last tokens active: so many tokens, and
# at most so many layers away
SCHEDULE_WINDOW = 5
SCHEDULE_RADIUS = 2


def wants_exit(probability: Tensor, threshold: Tensor | float) -> Tensor:
    """Whether a predictor's probability [R] asks to exit, bool [R]; NaN never does."""
    return probability > threshold


def among_drafts(token: Tensor, drafts: Tensor) -> Tensor:
    """Whether each verified token [R] is one of its draft tokens [R, K], bool [R]."""
    return (token[:, None] == drafts).any(-1)


def near_last_exits(layers: Tensor, recent: Tensor) -> Tensor:
    """Which of ``layers`` [N] lie near one of the ``recent`` exit layers [W], bool [N]."""
    return ((layers[:, None] - recent[None]).abs() <= SCHEDULE_RADIUS).any(-1)
