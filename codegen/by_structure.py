"""The base of the compilers of segments: isomorphic segments compile once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor
from torch.fx import GraphModule

from eepass.segments import GraphToMake

Compiled = Callable[[list[Tensor]], Sequence[Tensor]]


class ByStructure:
    """Compiles graphs and keeps the results by structure; subclasses implement ``compile``."""

    def __init__(self) -> None:
        self.compiled: dict[tuple[str, bool], Compiled] = {}

    def __call__(
        self,
        graph: GraphModule | GraphToMake,
        structure: str,
        examples: Sequence[Tensor],
        *,
        logits: bool = False,
    ) -> Compiled:
        """``graph`` compiled: a function from a list of its inputs, which it may clear, to outputs.

        ``logits``: the outputs are the model's logits, and their sums are kept in float32.
        """
        key = (structure, logits)
        if key not in self.compiled:
            self.compiled[key] = self.compile(GraphToMake.made(graph), examples, logits)
        return self.compiled[key]

    def compile(self, graph: GraphModule, examples: Sequence[Tensor], logits: bool) -> Compiled:
        raise NotImplementedError


def return_a_tuple(graph: GraphModule) -> None:
    """Let ``graph`` return a tuple, even of a single output."""
    output = graph.graph.output_node()
    if not isinstance(output.args[0], (tuple, list)):
        output.args = ((output.args[0],),)
