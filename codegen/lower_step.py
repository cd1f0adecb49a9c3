"""Compile what a decode step launches for a CUDA device: pieces of a decoder, and updates."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._guards import tracing
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from eepass import ops
from eepass.codegen.by_structure import ByStructure, Compiled, return_a_tuple
from eepass.codegen.lower_linear import lower_logits

# products of one row become kernels that read weights at full width; launches are captured by the
# runtime, so no graphs here
SETTINGS = {
    "coordinate_descent_tuning": True,
    "triton.cudagraphs": False,
    # for graphs before ATen; ours are past that
    "use_pre_grad_passes": False,
}


class StepCompiler(ByStructure):
    """As ``CpuCompiler``, through inductor's code for GPUs."""

    def __init__(self) -> None:
        super().__init__()
        register_logits()

    def compile(self, graph: GraphModule, examples: Sequence[Tensor], logits: bool) -> Compiled:
        # imports all of inductor
        from torch._inductor.compile_fx import compile_fx

        whole = copy.deepcopy(graph)
        if logits:
            lower_logits(whole)
        return_a_tuple(whole)
        whole.recompile()
        # a caller may be compiling: this graph has no part in that
        with torch.no_grad(), tracing(None):
            function: Any = compile_fx(whole, list(examples), config_patches=SETTINGS)
        return lambda inputs: function(*inputs)

    def fuse(self, update: Callable[..., None]) -> Callable[..., None]:
        """``update``, a function that only writes to tensors it is given, as one compiled function;
        compiled when it is first called."""
        found: list[Compiled] = []

        def run(*tensors: Tensor) -> None:
            if not found:
                # memory of their own: parts of one whole would be compiled as such
                examples = [torch.empty_strided(
                    t.shape, t.stride(), dtype=t.dtype, device=t.device
                ) for t in tensors]  # fmt: skip
                graph = make_fx(update, tracing_mode="fake")(*examples)
                found.append(self.compile(graph, examples, logits=False))
            found[0](list(tensors))

        return run


@functools.cache
def register_logits() -> torch.library.Library:
    """Logits on CUDA without a copy of the head in float32; register once."""
    library = torch.library.Library("eepass", "IMPL", "CUDA")
    library.impl("logits_rows", _logits_rows)
    return library


def _logits_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if weight.dtype == torch.float32 or x.dtype != weight.dtype:
        return ops.logits_rows(x, weight, bias)
    logits: Any = torch.mm(x, weight.T, out_dtype=torch.float32)
    return logits if bias is None else logits + bias.float()
