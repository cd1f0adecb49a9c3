"""Compile segments of a decoder with any of Dynamo's backends, once per structure."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.backends.registry import lookup_backend
from torch._guards import tracing
from torch.fx import GraphModule

from eepass.codegen.by_structure import ByStructure, Compiled, return_a_tuple


class InnerCompiler(ByStructure):
    """As ``CpuCompiler``, with the backend of that name and nothing lowered."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        self.backend: Callable[..., Any] = lookup_backend(backend)

    def compile(self, graph: GraphModule, examples: Sequence[Tensor], logits: bool) -> Compiled:
        whole = copy.deepcopy(graph)
        return_a_tuple(whole)
        whole.recompile()
        # a caller may be compiling: this graph has no part in that
        with torch.no_grad(), tracing(None):
            function = self.backend(whole, list(examples))
        return lambda inputs: function(*inputs)
