"""What compilers of segments share: isomorphic segments compile once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor
from torch.fx import GraphModule

Compiled = Callable[[list[Tensor]], Sequence[Tensor]]


class ByStructure:
    """Compiles graphs and remembers them by structure; ``compile`` is the subclass's."""

    def __init__(self) -> None:
        self.compiled: dict[tuple[str, bool], Compiled] = {}

    def __call__(
        self,
        graph: GraphModule,
        structure: str,
        examples: Sequence[Tensor],
        *,
        logits: bool = False,
    ) -> Compiled:
        """``graph`` as a function from a list of its inputs, which it may clear, to its outputs.

        ``logits``: these are the model's own; where sums are rounded, they stay in float32.
        """
        key = (structure, logits)
        if key not in self.compiled:
            self.compiled[key] = self.compile(graph, examples, logits)
        return self.compiled[key]

    def compile(self, graph: GraphModule, examples: Sequence[Tensor], logits: bool) -> Compiled:
        raise NotImplementedError


def return_a_tuple(graph: GraphModule) -> None:
    """Let ``graph`` give a tuple of outputs, be it one alone."""
    output = graph.graph.output_node()
    if not isinstance(output.args[0], (tuple, list)):
        output.args = ((output.args[0],),)
