"""Compile segments of a decoder for a GPU, once per structure.

    before   logits = linear(z, lm_head)                   the model's own logits
             logits = eepass.logits_rows(z, head, bias)    an exit's
    after    logits = eepass.verify_head(z, head, bias, ..., want_logits=True)[2]
             logits = eepass.packed_logits(z, head, ...)   where the head is quantised

in float32, with one reading of the head. In layers that are captured

    before   q, k, v = linear(x, wq), linear(x, wk), linear(x, wv)      x of 1 to 32 rows, bf16
    after    q, k, v = eepass.linear_rows(x, [wq, wk, wv], [...])

whose kernel gives a row the same bits among 1 to 16 rows, needs no workspace of a library, and is
not tuned; quantised ones become ``eepass.packed_rows``, whose kernel does so for any number of
rows; attention becomes ``eepass.attend_spans`` (``lower_attention``), whose kernel reads no
more of the cache than its rows attend to: they say so in three numbers each, in place of a mask.
Launched from Python, layer by layer, they would cost more than inductor's own code.

In layers over chunks of a prompt, which are not captured, products are the library's and attention
becomes ``eepass.attend_prefix``, torch's own over the text so far.

A graph of fused operators and views alone runs as it is: inductor would add nothing. The rest goes
through inductor, without its CUDA graphs (the runtime captures whole steps). A graph that inductor
cannot compile runs as it was traced; ``report`` says which, and why.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

import eepass.ops.fused  # noqa: F401  the operators must be defined before they are looked for
from eepass.codegen.by_structure import ByStructure, Compiled, return_a_tuple
from eepass.codegen.lower_attention import lower_attention, take_spans
from eepass.codegen.lower_cpu import for_inductor, through_inductor
from eepass.codegen.lower_linear import PACKED, as_rows, lower_linear, replace, row_count
from eepass.codegen.lower_linear import lower_logits as packed_logits
from eepass.private_names import TorchDynamoException, inductor_config
from eepass.segments import GraphToMake

aten, ours = torch.ops.aten, torch.ops.eepass
SETTINGS: dict[str, Any] = {
    "triton.cudagraphs": False,
    "max_autotune": False,
}
# Products of one row become kernels that read weights at full bandwidth, if they are tuned: dozens
# of variants of each kernel of a graph are run. Other graphs are not tuned, whatever
# the process set before (torchao turns it on for everything)
TUNING = "coordinate_descent_tuning"
PRODUCTS = {aten.linear.default, aten.mm.default, aten.addmm.default, aten.matmul.default}
FUSED = {
    ours.exit_predictor.default, ours.verify_head.default, ours.draft_topk.default,
}  # fmt: skip
# what a fused graph may hold besides, at next to no cost
VIEWS = {
    operator.getitem, aten.new_zeros.default, aten.select.int, aten.unsqueeze.default,
    aten.squeeze.dim, aten.view.default, aten.slice.Tensor, aten.reshape.default,
}  # fmt: skip
# rows whose logits the kernel computes with one reading of the head, and rows of ``linear_rows``
MOST_ROWS, LINEAR_ROWS = 32, 32
# what the kernel of attention multiplies, and how many channels an SM has shared memory for
ATTENTION, WIDEST = (torch.bfloat16, torch.float16), 256
LIBRARY_ATTENTION = (torch.float32, *ATTENTION)


class CudaCompiler(ByStructure):
    """Lowers graphs for a GPU and compiles them; called as ``CpuCompiler`` is.

    Works on CPU tensors too, where the operators run their reference implementations, or the
    kernels in Triton's interpreter. ``through``: the compiler for graphs that are not fused.
    """

    kernels_missing = ""

    def __init__(self, through: Callable[[GraphModule, Sequence[Tensor]], Compiled] | None = None):
        super().__init__()
        self._through = through or compile_through_inductor
        self.report: dict[str, list[str]] = {"fused": [], "inductor": [], "as traced": []}
        self._captured: dict[tuple[Any, ...], Compiled] = {}
        # by update and by what its tensors are like
        self._updates: dict[tuple[Any, ...], Compiled] = {}

    def captured(
        self, graph: GraphModule | GraphToMake, structure: str, examples: Sequence[Tensor]
    ) -> Compiled:
        """As a call, for a layer that is captured into a graph; ``examples`` may hold spans in
        place of masks."""
        key = structure, tuple(x.shape for x in examples)
        if key not in self._captured:
            made = copy.deepcopy(GraphToMake.made(graph))
            take_spans(made, examples)
            lower_linear(made, _fits_the_kernel)
            lower_attention(made, ATTENTION, WIDEST)
            self._captured[key] = self.compile(made, examples, logits=False)
        return self._captured[key]

    def wide(
        self, graph: GraphModule | GraphToMake, structure: str, examples: Sequence[Tensor]
    ) -> Compiled:
        """As a call, for a layer over a chunk of a prompt, whose products and attention are
        libraries'; ``examples`` hold prefixes in place of plain masks."""
        key = "wide", structure, tuple(x.shape for x in examples)
        if key not in self._captured:
            made = copy.deepcopy(GraphToMake.made(graph))
            take_spans(made, examples)
            lower_attention(made, LIBRARY_ATTENTION)
            self._captured[key] = self.compile(made, examples, logits=False)
        return self._captured[key]

    def compile(self, graph: GraphModule, examples: Sequence[Tensor], logits: bool) -> Compiled:
        lowered = copy.deepcopy(graph)
        notes = lower_logits(lowered, all_linears=logits)
        return_a_tuple(lowered)
        lowered.recompile()
        self.report["as traced"] += notes
        if is_fused(lowered):
            self.report["fused"].append(_name(lowered))
            return _as_traced(lowered)
        try:
            compiled = self._through(lowered, examples)
        except TorchDynamoException as error:
            reason = str(error).strip().splitlines()[0]
            self.report["as traced"].append(f"{_name(lowered)}: {reason}")
            return _as_traced(lowered)
        self.report["inductor"].append(_name(lowered))
        return compiled

    def fuse(self, update: Callable[..., None]) -> Callable[..., None]:
        """``update``, which only writes to tensors it is given, as one compiled function; it is
        compiled on the first call, once for all steps with such tensors."""
        what: tuple[Any, ...] = (update,)
        if isinstance(update, partial):
            what = (update.func, *update.args, *sorted(update.keywords.items()))
        found: list[Compiled] = []

        def run(*tensors: Tensor) -> None:
            if not found:
                key = (*what, *((t.shape, t.stride(), t.dtype, t.device) for t in tensors))
                if key not in self._updates:
                    self._updates[key] = self._compile_update(update, tensors)
                found.append(self._updates[key])
            found[0](list(tensors))

        return run

    def _compile_update(self, update: Callable[..., None], tensors: Sequence[Tensor]) -> Compiled:
        # copies: views of one tensor would be compiled as views
        examples = [
            torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device)
            for t in tensors
        ]
        graph = make_fx(update, tracing_mode="fake")(*examples)
        return self.compile(graph, examples, logits=False)


def compile_through_inductor(lowered: GraphModule, examples: Sequence[Tensor]) -> Compiled:
    settings = {**SETTINGS, TUNING: _has_one_row_product(lowered)}
    with (
        inductor_config.patch(settings),
        for_inductor(copy.deepcopy(lowered), examples) as (ready, fakes),
    ):
        return through_inductor(ready, fakes)


def lower_logits(gm: GraphModule, all_linears: bool) -> list[str]:
    """Compute the logits of ``gm`` with ``eepass.verify_head``, in place; with ``all_linears`` its
    linear layers' outputs are logits too. Returns what was left alone and why."""
    left = []
    if all_linears:
        packed_logits(gm, [PACKED])
    for node in list(gm.graph.nodes):
        is_logits = node.target is ours.logits_rows.default
        if not is_logits and not (all_linears and node.target is aten.linear.default):
            continue
        x, weight, bias = (*node.args, None)[:3]
        rows = row_count(x)
        call = gm.graph.call_function
        if rows > MOST_ROWS:
            left.append(f"{node.name}: {rows} rows are a matrix product")
            with gm.graph.inserting_after(node):
                new = call(aten.to.dtype, (node, torch.float32))
            node.replace_all_uses_with(new)
            # this replaced its own input as well
            new.update_arg(0, node)
            continue
        with gm.graph.inserting_before(node):
            flat = as_rows(gm, x)
            # there are no draft tokens to compare with
            draft = call(aten.new_zeros.default, (flat, [rows, 1]), {"dtype": torch.long})
            given = (flat, *[None] * 5, weight, None, bias, None, draft)
            form = ("none", 0.0, 0.0, 1.0, 0.0, True)
            found = call(ours.verify_head.default, (*given, *form))
            shape = list(node.meta["val"].shape)
            new = call(aten.reshape.default, (call(operator.getitem, (found, 2)), shape))
        replace(node, new)
    return left


def _fits_the_kernel(linear: Node) -> bool:
    if linear.target is PACKED:
        return True
    given: Any = linear.args
    x, weight = (node.meta["val"] for node in given[:2])
    few = x.numel() <= LINEAR_ROWS * x.shape[-1]
    return few and x.dtype == weight.dtype and x.dtype in (torch.bfloat16, torch.float16)


def _has_one_row_product(gm: GraphModule) -> bool:
    products = [node for node in gm.graph.nodes if node.target in PRODUCTS]
    # what is added in ``addmm`` comes first
    first: list[Any] = [node.args[node.target is aten.addmm.default] for node in products]
    return any(row_count(x) == 1 for x in first)


def is_fused(gm: GraphModule) -> bool:
    """Whether ``gm`` holds fused operators and views alone."""
    called = [node.target for node in gm.graph.nodes if node.op == "call_function"]
    return any(t in FUSED for t in called) and all(t in FUSED or t in VIEWS for t in called)


def _as_traced(graph: GraphModule) -> Compiled:
    def run(inputs: list[Tensor]) -> Sequence[Tensor]:
        result: Sequence[Tensor] = graph(*inputs)
        return result

    return run


def _name(graph: GraphModule) -> str:
    """A description of ``graph`` for the report: the operator it ends with."""
    found = [n for n in graph.graph.nodes if n.op == "call_function" and n.target not in VIEWS]
    last: Node | None = found[-1] if found else None
    return "nothing" if last is None else f"... {last.target} ({len(found)} operators)"
