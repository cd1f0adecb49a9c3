"""Compile segments of a decoder for the CPU: lowered, then through inductor, once per structure."""

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from eepass.codegen.by_structure import ByStructure, Compiled, return_a_tuple
from eepass.codegen.cpu.native import load_kernels
from eepass.codegen.loops import KNOWN_PROCESSOR, unbuilt
from eepass.codegen.lower_attention import lower_attention
from eepass.codegen.lower_linear import lower_linear, lower_logits
from eepass.codegen.lower_predictor import DECOMPOSITIONS
from eepass.codegen.native_program import natively
from eepass.private_names import (
    FakeTensorMode,
    TracingContext,
    compile_fx,
    compile_fx_inner,
    functorch_config,
    inductor_config,
    tracing,
)

SETTINGS: dict[str, Any] = {
    # these are for graphs before ATen, and ours are ATen already
    "use_pre_grad_passes": False,
    # a segment is always called with tensors of the same shape, allocated by eepass
    "size_asserts": False,
    "alignment_asserts": False,
    # Work that is smaller is not divided among threads. With inductor's 512 the sum of one row's
    # norm is, from 1,024 channels on two threads: added in another order than that of several rows
    "cpp.min_chunk_size": 1 << 15,
}


class CpuCompiler(ByStructure):
    """Lowers graphs and compiles them through inductor.

    ``kernels_missing`` says why the C++ kernels could not be built, or is empty.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels_missing = load_kernels()

    def compile(self, graph: GraphModule, examples: Sequence[Tensor], logits: bool) -> Compiled:
        with ready_to_compile(graph, examples, logits) as (lowered, fakes), unbuilt():
            return natively(through_inductor(lowered, fakes))


def through_inductor(lowered: GraphModule, fakes: list[Any]) -> Compiled:
    """Inductor's code for a graph and inputs that ``for_inductor`` prepared, called within it."""
    inner: list[Any] = []

    def keep(*args: Any, **kwargs: Any) -> Any:
        inner.append(compile_fx_inner(*args, **kwargs))
        return inner[-1]

    compile_fx(lowered, fakes, inner_compile=keep)
    # a pure function of tensors needs neither AOTAutograd's wrappers, which take half the time of a
    # call, nor inductor's own bookkeeping around the generated code
    (code,) = inner
    return getattr(code, "current_callable", None) or code


@contextmanager
def ready_to_compile(
    graph: GraphModule, examples: Sequence[Tensor], logits: bool
) -> Iterator[tuple[GraphModule, list[Any]]]:
    """``graph`` lowered, and its inputs as ``for_inductor`` prepares them."""
    lowered = copy.deepcopy(graph)
    if logits:
        lower_logits(lowered)
    lower_linear(lowered)
    lower_attention(lowered)
    with for_inductor(lowered, examples) as ready:
        yield ready


@contextmanager
def for_inductor(
    lowered: GraphModule, examples: Sequence[Tensor]
) -> Iterator[tuple[GraphModule, list[Any]]]:
    """A lowered graph and fake inputs for inductor, with inductor's settings in force."""
    return_a_tuple(lowered)
    lowered.graph.eliminate_dead_code(is_impure_node=_writes)
    lowered.recompile()
    # without a shape environment inductor would not cache its code for other processes
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    fakes: list[Any] = [mode.from_tensor(example, static_shapes=True) for example in examples]
    # AOTAutograd's own cache would return its wrapper around inductor's code, not the code
    uncached = functorch_config.patch(enable_autograd_cache=False)
    settings = inductor_config.patch(SETTINGS if load_kernels() else SETTINGS | KNOWN_PROCESSOR)
    quiet = warnings.catch_warnings()
    with torch.no_grad(), settings, uncached, tracing(TracingContext(mode)), quiet:
        # of scales in one dtype and states in the other, in code that computes in float32
        warnings.filterwarnings("ignore", message="bf16 and fp16 are mixed")
        if any(node.target in DECOMPOSITIONS for node in lowered.graph.nodes):
            # here and not in inductor, whose cache does not work with foreign decompositions
            lowered = make_fx(lowered, DECOMPOSITIONS, pre_dispatch=True)(*fakes)
        yield lowered, fakes


def _writes(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return node.op in ("placeholder", "output") or bool(schema and schema.is_mutable)
