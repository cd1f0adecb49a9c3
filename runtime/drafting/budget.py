"""What a draft may spend on the tree of one pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from eepass.runtime.drafting.acceptance import estimate_bin
from eepass.runtime.drafting.planner import Planner
from eepass.runtime.drafting.tree import Tree


@dataclass(slots=True)
class Budget:
    """What a draft may spend on one tree: ``most`` draft tokens, as long as another row of the pass
    or another call of the draft's model is worth its time."""

    planner: Planner
    most: int
    calls: int = 1
    # seconds that went to what would not have been there if the pass before had asked too
    behind: float = 0.0
    _least_joint: float = 0.0

    def __post_init__(self) -> None:
        self.most = min(self.most, self.planner.most_rows - 1)
        # half of it: a row of those that a pass is padded with costs nothing
        self._least_joint = self.planner.costs.row_seconds / self.planner.token_seconds / 2

    @staticmethod
    def bin(chance: float) -> int:
        return estimate_bin(chance)

    def chance(self, bin: tuple[int, ...], prior: float) -> float:
        return self.planner.acceptance.chance(bin, prior)

    def worth_a_row(self, joint: float) -> bool:
        return joint > self._least_joint

    def worth_a_call(self, joint: Sequence[float], level: Sequence[float]) -> bool:
        """Whether to run the draft's model once more.

        ``joint``: probabilities of the tree's draft tokens to be accepted; ``level``: of those that
        the model would be run for. Their children replace the least likely rows of the pass.
        """
        shares = self.planner.acceptance.children
        children = [chance * share for chance in level for share in shares]
        without, _ = self.planner.gain(sorted(joint, reverse=True))
        gained, _ = self.planner.gain(sorted([*joint, *children], reverse=True))
        worth = gained - without > self.planner.draft_seconds
        self.calls += worth
        return worth

    def ask(self, tree: Tree, add_to: Callable[[Tree, Budget], object]) -> bool:
        """Let ``add_to`` run the draft's model and add to ``tree``, if that is worth its time."""
        planner = self.planner
        without, _ = planner.gain(tree.sorted_joint())
        if not planner.worth_asking(without, len(tree) > 1):
            return False
        began = planner.clock()
        add_to(tree, self)
        gained, _ = planner.gain(tree.sorted_joint())
        seconds = planner.clock() - began - self.behind
        planner.asked(without, gained, seconds, self.calls, self.behind)
        return True
