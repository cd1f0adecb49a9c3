"""Write what a forward pass decided into the sequences, the cache, the draft and the statistics."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import torch

from eepass.runtime.cache.feature_cache import FeatureCache
from eepass.runtime.decoder.decoder import Decoder
from eepass.runtime.drafting.planner import Planner
from eepass.runtime.engine.scheduled_sequence import ScheduledSequence
from eepass.runtime.engine.sequence import PendingTokens
from eepass.runtime.statistics import Statistics


def commit(
    batch: SequenceOf[ScheduledSequence],
    decoder: Decoder,
    exact: bool,
    planner: Planner,
    statistics: Statistics,
    features: FeatureCache | None,
) -> None:
    """Each sequence keeps or rolls back its tokens and grows by its new ones; with ``exact`` those
    that exited early are not confirmed yet, nor those of rows that attended to some tokens alone.
    ``features``: the draft's."""
    statistics.passes += 1
    for one in batch:
        sequence = one.sequence
        before = sequence.num_confirmed
        if one.num_kept is not None:
            sequence.roll_back(one.num_kept)
            statistics.rollbacks += 1
        elif one.path:
            # accepted rows may have gaps between their slots
            root = sequence.first_slot + sequence.position
            sources = [root + node for node in one.path]
            decoder.kv.move(sources, root, one.exit_layer)
            if features is not None:
                features.move(sources, root)
        if one.embedded is not None:
            rows_kept = one.embedded[:, torch.tensor(one.path)]
            sequence.pending.append(PendingTokens(0, sequence.position, rows_kept))
        sequence.append(one.new_tokens, one.exit_layer)
        sequence.trim_pending()
        drafted = one.slots is not None
        if not drafted and (not exact or one.exit_layer == decoder.num_layers):
            sequence.num_confirmed = len(sequence.tokens)
        for step in sequence.decoded(before, sequence.num_confirmed):
            statistics.record_exit(step.exit_layer)
        if one.proposed is not None and one.num_kept is None:
            planner.learn(one.proposed, one.new_tokens)
