"""Compile pieces of a decoder with any of Dynamo's backends, once per structure."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.backends.registry import lookup_backend
from torch._guards import tracing
from torch.fx import GraphModule

Compiled = Callable[[list[Tensor]], Sequence[Tensor]]


class InnerCompiler:
    """As ``CpuCompiler``, with the backend of that name and nothing lowered."""

    def __init__(self, backend: str) -> None:
        self.backend: Callable[..., Any] = lookup_backend(backend)
        self.compiled: dict[tuple[str, bool], Compiled] = {}

    def __call__(
        self,
        graph: GraphModule,
        structure: str,
        examples: Sequence[Tensor],
        *,
        logits: bool = False,
    ) -> Compiled:
        """``graph`` as a function from a list of its inputs to its outputs."""
        key = (structure, logits)
        if key not in self.compiled:
            whole = copy.deepcopy(graph)
            output = whole.graph.output_node()
            if not isinstance(output.args[0], (tuple, list)):
                output.args = ((output.args[0],),)
            whole.recompile()
            # a caller may be compiling: this graph has no part in that
            with torch.no_grad(), tracing(None):
                function = self.backend(whole, list(examples))
            self.compiled[key] = lambda inputs: function(*inputs)
        return self.compiled[key]
