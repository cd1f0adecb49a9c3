"""Join the segments into one exit graph: the chain of ``exit_chain`` as a ``torch.fx`` graph.

    before   hidden = layers[0](hidden); hidden = layers[1](hidden); ...; argmax(head(hidden))
    after    hidden = cond(done, fill_0, layer_0, hidden, ...)
             wanted, previous, z = cond(active & ~done, predict_0, keep_0, hidden, draft, ...)
             done, token, exit_layer = cond(wanted, verify_0, keep_1, z, draft, ...)
             ...
             token = cond(done, keep_2, head_0, hidden, token, ...)

Layers write keys and values in place. Which predictors are active, and their thresholds, are
inputs. Conditionals are never nested: ``torch.export`` takes writes in place inside a flat one.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from eepass.passes.exits.exit_chain import ExitChain
from eepass.passes.exits.step_builder import Call, Function, unaliased
from eepass.passes.graph_walk import hoist_placeholders
from eepass.passes.report import PassReport
from eepass.plan import ExitPlan, ExitSegments
from eepass.private_names import FakeTensorMode
from eepass.segments import Input, Segment, SplitDecoder

cond = torch.ops.higher_order.cond
aten = torch.ops.aten


def insert_exits(
    split: SplitDecoder, segments: ExitSegments, plan: ExitPlan, tensors: Mapping[str, Tensor],
    report: PassReport,
) -> Segment:  # fmt: skip
    """The exit graph for one row.

    Inputs: ids, positions, masks, keys, values and slots as in the traced decoder; ``active``
    bool [L + 1] and ``threshold`` float32 [L + 1] by exit layer; ``draft`` int64 [1, K] (used where
    the plan takes its draft tokens from no hidden state); parameters by name. Outputs: token [1],
    exit_layer [1], hidden [1, 1, H], the hidden state at the exit.
    """
    read = (split.embed, split.positional, *split.layers, *split.kv_fills)
    examples = {role: like for segment in read for role, like in segment.examples.items()}
    build = _GraphBuilder(tensors)
    by_layer = torch.zeros(plan.num_layers + 1)
    draft = torch.zeros(1, plan.draft_tokens, dtype=torch.long)
    chain = ExitChain(build, split, segments, plan, lambda role: build.input(role, examples[role]))
    token, exit_layer, hidden, _ = chain.write(
        build.input(Input("draft", "active"), by_layer.bool()),
        build.input(Input("draft", "threshold"), by_layer),
        build.input(Input("draft", "draft"), draft),
    )
    report.rewritten += plan.num_layers
    return build.finish(token, exit_layer, hidden)


class _GraphBuilder:
    """Calls are copied into the graph, branches are submodules; ``meta["val"]`` of each node is a
    tensor without values."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors
        self.graph, self.root = Graph(), torch.nn.Module()
        self.inputs: dict[Input, Node] = {}
        self.traced: dict[Hashable, GraphModule] = {}
        self.names: dict[Hashable, str] = {}
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)

    def input(self, role: Input, like: Tensor) -> Node:
        if role not in self.inputs:
            name = f"{role.kind}_{role.name}".replace(".", "_")
            self.inputs[role] = self.graph.placeholder(name)
            self.inputs[role].meta["val"] = self._fake(like)
        return self.inputs[role]

    def weight(self, name: str) -> Node:
        return self.input(Input("parameter", name), self.tensors[name])

    def constant(self, tensor: Tensor) -> Node:
        """``tensor``, whose elements are all equal."""
        args = (tuple(tensor.shape), tensor.flatten()[0].item())
        node = self.graph.call_function(aten.full.default, args, {"dtype": tensor.dtype})
        node.meta["val"] = self._fake(tensor)
        return node

    def call(self, call: Call) -> list[Node]:
        if call.key not in self.traced:
            self.traced[call.key] = self._trace(call.function, call.operands)
        graph = self.traced[call.key].graph
        operands = dict(zip(graph.find_nodes(op="placeholder"), call.operands, strict=True))
        results = self.graph.graph_copy(graph, operands)
        assert isinstance(results, (list, tuple))
        return list(results)

    def branch(
        self, condition: Node, then: Call | Sequence[Node], otherwise: Call | Sequence[Node]
    ) -> list[Node]:
        cases = [
            case if isinstance(case, Call) else Call("keep", lambda *values: values, case)
            for case in (then, otherwise)
        ]
        # both branches take the same operands, and export wants each of them once
        operands = list(dict.fromkeys(node for case in cases for node in case.operands))
        names = [self._branch(case, operands) for case in cases]
        branches = (self.graph.get_attr(name) for name in names)
        out = self.graph.call_function(cond, (condition, *branches, tuple(operands)))
        (results,) = getattr(self.root, names[0]).graph.output_node().args
        nodes = [self.graph.call_function(operator.getitem, (out, n)) for n in range(len(results))]
        for node, result in zip(nodes, results, strict=True):
            node.meta["val"] = result.meta["val"]
        return nodes

    def finish(self, *outputs: Node) -> Segment:
        self.graph.output(outputs)
        hoist_placeholders(self.graph, list(self.inputs.values()))
        module = GraphModule(self.root, self.graph)
        module.graph.lint()
        return Segment(module, tuple(self.inputs))

    def _branch(self, case: Call, operands: Sequence[Node]) -> str:
        """The name of the submodule that takes ``operands`` and returns the results of ``case``."""
        places = [operands.index(node) for node in case.operands]
        likes = [node.meta["val"] for node in operands]
        key = (case.key, *places, *((x.shape, x.stride(), x.dtype) for x in likes))
        if key not in self.names:
            number = Counter(name.rpartition("_")[0] for name in self.names.values())[case.kind]
            self.names[key] = f"{case.kind}_{number}"

            def run(*values: Tensor) -> Sequence[Tensor]:
                return unaliased(case.function(*(values[place] for place in places)))

            setattr(self.root, self.names[key], self._trace(run, operands))
        return self.names[key]

    def _trace(self, function: Function, operands: Sequence[Node]) -> GraphModule:
        fakes = [self._fake(node.meta["val"]) for node in operands]
        with torch.no_grad():
            return make_fx(function, pre_dispatch=True)(*fakes)

    def _fake(self, like: Tensor) -> Tensor:
        with self.mode:
            return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype)
