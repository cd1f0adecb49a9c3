"""Choose what each sequence brings to the next forward pass: draft tokens and active exits."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from time import perf_counter

import torch
from torch import Tensor

from eepass.errors import EngineError
from eepass.runtime.decoder.decoder import Decoder
from eepass.runtime.drafting.budget import Budget
from eepass.runtime.drafting.eagle_tree import EagleTree
from eepass.runtime.drafting.planner import Mode, Planner
from eepass.runtime.drafting.tree import Tree
from eepass.runtime.engine.scheduled_sequence import ScheduledSequence
from eepass.runtime.engine.sequence import Sequence
from eepass.runtime.engine.verifier import Verifier
from eepass.runtime.exits.exits import Exits
from eepass.runtime.statistics import Statistics


class BatchScheduler:
    """``pending_limit`` bounds a sequence's pending tokens."""

    def __init__(
        self,
        decoder: Decoder,
        exits: Exits | None,
        verifier: Verifier,
        kv_policy: str,
        pending_limit: int,
    ) -> None:
        self.decoder, self.exits, self.verifier = decoder, exits, verifier
        self.kv_policy, self.pending_limit = kv_policy, pending_limit

    def schedule(
        self,
        sequences: SequenceOf[Sequence],
        mode: Mode,
        max_rows: int,
        planner: Planner,
        statistics: Statistics,
        slots: Tensor | None = None,
    ) -> list[ScheduledSequence]:
        """``max_rows``: how many rows of the pass each sequence may have; ``slots``: what they
        attend to, where that is not all."""
        batch, spent = [], statistics.draft_seconds
        drafts = mode in ("speculation", "both") and planner.may_pay(len(sequences), max_rows - 1)
        for sequence in sequences:
            tree = Tree([sequence.tokens[-1]])
            pending = sequence.num_pending if slots is None else 0
            proposed = tree
            max_drafts = min(
                max_rows - 1 - pending,
                sequence.capacity - sequence.position - 1,
                sequence.max_new_tokens - (len(sequence.tokens) - sequence.prompt_length) - 1,
            )
            if drafts and sequence.draft is not None and max_drafts > 0:
                began = perf_counter()
                budget = Budget(planner, max_drafts)
                proposed = sequence.draft.propose(tree.tokens[0], budget, sequence.features_at)
                tree = planner.choose(proposed, max_drafts, pending, len(sequences) - 1)
                statistics.draft_seconds += perf_counter() - began
            active: frozenset[int] = frozenset()
            if mode in ("exits", "both") and self.exits is not None:
                active = self._active_exits(sequence, pending + len(tree), max_rows)
            choose = self.verifier.exit_sampler(sequence)
            batch.append(ScheduledSequence(sequence, tree, proposed, active, choose, slots))
        if drafts and len(batch) > 1:
            rows = sum(len(one.tree or ()) for one in batch)
            planner.looked(len(batch), rows, statistics.draft_seconds - spent)
        return batch

    def predictor_drafts(
        self, batch: SequenceOf[ScheduledSequence], statistics: Statistics
    ) -> Tensor | None:
        """Draft tokens [R, K] for the predictors, where the exit plan takes them from no layer."""
        if self.exits is None or self.exits.plan.draft_layer:
            return None
        if not any(one.active_exits for one in batch):
            return None
        rows = []
        for one in batch:
            sequence = one.sequence
            draft = sequence.draft
            assert isinstance(draft, EagleTree) and one.tree is not None
            if len(one.tree) > 1:
                raise EngineError("exits that draft from no layer go with one row a pass")
            began = perf_counter()
            rows.append(draft.candidates(self.exits.plan.draft_tokens, sequence.features_at))
            statistics.draft_seconds += perf_counter() - began
        return torch.stack(rows)

    def _active_exits(self, sequence: Sequence, rows: int, max_rows: int) -> frozenset[int]:
        assert self.exits is not None
        last = self.decoder.num_layers
        if sequence.schedule is not None:
            active = sequence.schedule.active()
        else:
            active = frozenset(self.exits.thresholds)
        if self.verifier.exact:
            # the last layer's next token comes from the LM head over the whole vocabulary
            active -= {last}
        if self.kv_policy == "defer" and rows > min(self.pending_limit, max_rows - 1):
            # after an exit these rows would be too many pending tokens
            active &= {last}
        return active
