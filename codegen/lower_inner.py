"""Compile segments of a decoder with any of Dynamo's backends, once per structure."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from eepass.codegen.by_structure import ByStructure, Compiled, return_a_tuple
from eepass.private_names import lookup_backend, tracing


class InnerCompiler(ByStructure):
    """As ``CpuCompiler``, but with Dynamo's backend of that name, and nothing is lowered."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        self.backend: Callable[..., Any] = lookup_backend(backend)

    def compile(self, graph: GraphModule, examples: Sequence[Tensor], logits: bool) -> Compiled:
        whole = copy.deepcopy(graph)
        return_a_tuple(whole)
        whole.recompile()
        # the caller may itself be compiling; this graph is compiled on its own
        with torch.no_grad(), tracing(None):
            function = self.backend(whole, list(examples))
        return lambda inputs: function(*inputs)
