"""What one sequence brings to a forward pass, and what the pass decides for it."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from eepass.runtime.drafting.tree import Tree
from eepass.runtime.engine.sequence import Sequence
from eepass.runtime.exits.exits import Choose


@dataclass(slots=True, eq=False)
class ScheduledSequence:
    """``tree`` holds the last token and its draft tokens; without it only pending tokens are run.

    The forward pass and the verifier fill in the rest. Nodes are those of ``tree``.
    """

    sequence: Sequence
    tree: Tree | None = None
    # all that was drafted, run or not
    proposed: Tree | None = None
    active_exits: frozenset[int] = frozenset()
    choose: Choose | None = None
    # the slots its rows attend to where these are not all, int32 [S]: what follows from them are
    # draft tokens, for a pass that attends to all; and the states of its nodes [1, N, H] before the
    # first layer, with which that pass begins
    slots: Tensor | None = None
    embedded: Tensor | None = None
    # what follows each node for which that is decided
    next_tokens: dict[int, int] = field(default_factory=dict)
    # the accepted nodes, root first, and the layers run for them
    path: list[int] = field(default_factory=list)
    exit_layer: int = 0
    # tokens the sequence grows by, and how many it keeps if later ones are rolled back
    new_tokens: list[int] = field(default_factory=list)
    num_kept: int | None = None
    # whether pending tokens came with it that had run some layers already
    skipped: bool = False
    # positions of the pending tokens that went through the last layer
    caught_up: list[int] = field(default_factory=list)
    # the number of its first node among those of all trees of the pass
    first_node: int = 0

    @property
    def is_dense(self) -> bool:
        """Whether all its rows go through all layers, and no predictor runs."""
        return self.tree is not None and not self.active_exits and not self.skipped

    def viable_nodes(self) -> list[int]:
        """Nodes that may still be accepted, given the next tokens decided so far."""
        assert self.tree is not None
        found = [0]
        for node in range(1, len(self.tree)):
            parent = self.tree.parents[node]
            fits = self.next_tokens.get(parent, self.tree.tokens[node]) == self.tree.tokens[node]
            if fits and parent in found:
                found.append(node)
        return found

    def reject_after(self, position: int, recovered: int) -> None:
        """Roll back what follows ``position``, where ``recovered`` is the right next token."""
        self.num_kept, self.path, self.new_tokens = position + 1, [], [recovered]

    def collect_new_tokens(self) -> None:
        """Take the tokens along the path, up to where the answer ends."""
        sequence, kept = self.sequence, self.num_kept
        if kept is None:
            self.new_tokens = [self.next_tokens[node] for node in self.path]
            kept = len(sequence.tokens)
        before = kept - sequence.prompt_length
        for count, token in enumerate(self.new_tokens, 1):
            if token in sequence.stop or before + count >= sequence.max_new_tokens:
                self.new_tokens, self.path = self.new_tokens[:count], self.path[:count]
                return
