"""How far the draft head's tokens are accepted, by kind of text and position in the draft."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from operator import mul
from typing import Any

from torch import Tensor

from eepass.checkpoints.artifact import without_prefix
from eepass.training.corpus import HELD_OUT
from eepass.training.dense_model import DenseModel
from eepass.training.hidden_states import HiddenStateStore
from eepass.training.unrolling import draft_hits

# answer tokens below which a share says nothing
FEWEST = 50


def report_by_kind(
    tensors: Mapping[str, Tensor], store: HiddenStateStore, model: DenseModel, steps: int
) -> dict[str, Any]:
    """For each kind of text ``accepted``: the share of first choices that are the dense token, by
    position in the draft, given that those before it were; ``a_pass``: the tokens of a pass with a
    chain of ``steps`` drafts.

    ``held_out`` says whether the kinds were left out of training, or only these texts of them.
    """
    held_out = len(store.labels(HELD_OUT)) > 0
    head = without_prefix(tensors, "eagle.")
    hot = head["hot.ids"].long()
    hot_head = head.get("hot.head", model.lm_head[hot])
    kinds = {}
    split = HELD_OUT if held_out else "calibrate"
    for kind, (lines, label) in store.lines_by_kind(split).items():
        tokens = int((label >= 0).sum())
        if tokens < FEWEST:
            continue
        hits = draft_hits(head, lines, label, model.embedding, hot, hot_head, steps)
        accepted = [hit["top1"] for hit in hits]
        a_pass = 1 + sum(accumulate(accepted, mul))
        kinds[kind] = {"tokens": tokens, "accepted": accepted, "a_pass": a_pass}
    return {"held_out": held_out, "kinds": kinds}
