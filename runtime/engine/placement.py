"""Where sequences lie in the cache: how they are given slots, grow, move, and share beginnings.

Slots are given in blocks, as answers get longer, so that many short texts fit where few long ones
would. A sequence whose neighbour is in the way moves; where free slots lie scattered, all move
together. What an ended sequence leaves is kept as long as nobody needs its slots: a text that
begins with the same tokens copies their keys and values, or goes on in their place.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

from eepass.runtime.cache.feature_cache import FeatureCache
from eepass.runtime.cache.regions import KeptText, common
from eepass.runtime.decoder.decoder import Decoder
from eepass.runtime.engine.sequence import Sequence

# slots that a sequence is given at a time, beside its prompt's
BLOCK = 64
# beginnings of fewer tokens are not worth it
LEAST_SHARED = 16
# a text that repeats so much of a kept one goes on in its place
CONTINUES = 0.9


class Placement:
    """Gives sequences slots in the cache of ``decoder``; ``complete``: whether the keys and values
    of generated tokens are those of a prompt; ``feature_layers``: a draft's, if it takes any."""

    def __init__(
        self, decoder: Decoder, complete: bool, feature_layers: SequenceOf[int] | None = None
    ) -> None:
        self.decoder, self.complete = decoder, complete
        self.features: FeatureCache | None = None
        if feature_layers is not None:
            self.features = FeatureCache(decoder.cache_length, feature_layers)
        # other engines' features are not known here
        decoder.kv.regions.forget()
        # those that have slots
        self.sequences: list[Sequence] = []

    def fits(self, count: int, growing: int = 0) -> bool:
        """Whether another sequence may have ``count`` slots, while ``growing`` others may need a
        block more each."""
        return self.decoder.kv.fits(count + growing * BLOCK)

    def place(self, sequence: Sequence, count: int) -> bool:
        """Give ``sequence``, which has no slots, ``count`` of them; False if there are too few."""
        regions = self.decoder.kv.regions
        text, length = self._kept_like(sequence)
        if text is not None and length >= CONTINUES * len(text.tokens):
            sequence.first_slot, sequence.capacity = regions.take_over(text), len(text.tokens)
            self.sequences.append(sequence)
            sequence.num_prefilled = length
            if count <= sequence.capacity or self.grow(sequence, count):
                return True
            self.leave(sequence)
            return False
        sequence.num_prefilled = 0
        return self._find(sequence, count)

    def share(self, sequence: Sequence) -> None:
        """Copy what ``sequence`` begins with from another sequence, or from a kept text."""
        found: list[tuple[int, int, KeptText | None]] = []
        kept, length = self._kept_like(sequence)
        if kept is not None:
            found.append((length, kept.first, kept))
        for other in self.sequences:
            if other is not sequence and other.shares:
                length = self._shared(sequence, other.tokens[: self._complete(other)])
                found.append((length, other.first_slot, None))
        length, first, text = max(found, key=lambda one: one[0], default=(0, 0, None))
        if not sequence.shares or length < LEAST_SHARED:
            return
        self._copy(first, sequence.first_slot, length)
        sequence.num_prefilled = length
        if text is not None:
            self.decoder.kv.regions.touch(text)

    def grow(self, sequence: Sequence, count: int) -> bool:
        """Let ``sequence`` have ``count`` slots, where it is or elsewhere; False if there are too
        few."""
        regions = self.decoder.kv.regions
        if regions.extend(sequence.first_slot, count):
            sequence.capacity = count
            return True
        old, used = sequence.first_slot, self._used(sequence)
        if (first := regions.allocate(count)) is not None:
            self._copy(old, first, used)
            regions.release(old)
            sequence.first_slot, sequence.capacity = first, count
            return True
        if count - sequence.capacity > regions.free:
            return False
        self._gather(sequence)
        if not regions.extend(sequence.first_slot, count):
            return False
        sequence.capacity = count
        return True

    def leave(self, sequence: Sequence) -> None:
        """Take the slots of ``sequence``; what it shares stays for others, as long as it can."""
        self.sequences.remove(sequence)
        regions, count = self.decoder.kv.regions, self._complete(sequence)
        if sequence.shares and count >= LEAST_SHARED:
            regions.keep(sequence.first_slot, sequence.tokens[:count])
        else:
            regions.release(sequence.first_slot)
        sequence.capacity = 0

    def _find(self, sequence: Sequence, count: int) -> bool:
        kv = self.decoder.kv
        first = kv.allocate(count)
        if first is None and self.sequences and kv.fits(count):
            self._gather()
            first = kv.allocate(count)
        if first is None:
            return False
        sequence.first_slot, sequence.capacity = first, count
        self.sequences.append(sequence)
        return True

    def _gather(self, growing: Sequence | None = None) -> None:
        """Move all sequences together: those up to ``growing`` to the beginning of the cache, those
        behind it to the end."""
        regions = self.decoder.kv.regions
        # they would be in the way
        regions.forget()
        ordered = sorted(self.sequences, key=lambda sequence: sequence.first_slot)
        middle = len(ordered) if growing is None else ordered.index(growing) + 1
        moves = [(sequence, False) for sequence in ordered[:middle]]
        moves += [(sequence, True) for sequence in ordered[: middle - 1 : -1]]
        for sequence, top in moves:
            old = sequence.first_slot
            regions.release(old)
            first = regions.allocate(sequence.capacity, top)
            assert first is not None
            if first != old:
                self._copy(old, first, self._used(sequence))
                sequence.first_slot = first

    def _kept_like(self, sequence: Sequence) -> tuple[KeptText | None, int]:
        """The kept text that ``sequence`` shares most with, and how many tokens."""
        if not sequence.shares:
            return None, 0
        found = [(self._shared(sequence, k.tokens), k) for k in self.decoder.kv.regions.kept]
        length, text = max(found, key=lambda one: one[0], default=(0, None))
        return (text, length) if length >= LEAST_SHARED else (None, 0)

    def _shared(self, sequence: Sequence, tokens: SequenceOf[int]) -> int:
        # the logits of a prompt's last token are needed
        most = min(sequence.num_to_prefill, len(sequence.tokens) - 1)
        return common(sequence.tokens[:most], tokens)

    def _complete(self, sequence: Sequence) -> int:
        """How many of its first tokens have the keys and values that a prompt would have."""
        count = sequence.num_in_cache(self.decoder.num_layers)
        return count if self.complete else min(count, sequence.prompt_length)

    def _used(self, sequence: Sequence) -> int:
        """Slots that hold something of ``sequence``."""
        if sequence.num_prefilled is not None:
            return sequence.num_prefilled
        return sequence.position

    def _copy(self, source: int, target: int, count: int) -> None:
        self.decoder.kv.copy(source, target, count)
        self.decoder.side_inputs.copy(source, target, count)
        if self.features is not None:
            self.features.copy(source, target, count)
