"""Join the segments into one exit graph: a flat chain of conditional layers.

    before   hidden = layers[0](hidden); hidden = layers[1](hidden); ...; argmax(head(hidden))
    after    state = cond(done, pass_through, layer_0, state, ...)
             state = cond(done, pass_through, layer_1_and_predictor, state, ...)
             ...
             token = cond(done, keep, head, state)

The state is hidden, draft, previous, done, token, exit_layer. Predictors sit inside the branches:
after an exit they do not run. Which are active, and their thresholds, are inputs. Conditions are
never nested. With KV policy ``propagate`` passing through a layer writes its keys and values from
the exit's boundary; with ``defer`` the hidden state that comes out is the boundary at the exit, and
whoever runs the graph catches the token up; ``drop`` leaves holes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from eepass.passes.graph_walk import hoist_placeholders
from eepass.passes.report import PassReport
from eepass.plan import ExitPlan, ExitSegments
from eepass.segments import Input, Segment, SplitDecoder

cond = torch.ops.higher_order.cond
STATE = 6  # hidden, draft, previous, done, token, exit_layer


def insert_exits(
    split: SplitDecoder,
    segments: ExitSegments,
    plan: ExitPlan,
    tensors: Mapping[str, Tensor],
    report: PassReport,
) -> Segment:
    """The exit graph for one row.

    Inputs: ids, positions, masks, keys, values and starts as in the traced decoder; ``active``
    bool [L + 1] and ``threshold`` float32 [L + 1] by exit layer; ``draft`` int64 [1, K] (used where
    the plan drafts from no boundary); parameters by name. Outputs: token [1], exit_layer [1],
    hidden [1, 1, H] where the token left.
    """
    return _Chain(split, segments, plan, tensors, report).build()


class _Chain:
    def __init__(
        self,
        split: SplitDecoder,
        segments: ExitSegments,
        plan: ExitPlan,
        tensors: Mapping[str, Tensor],
        report: PassReport,
    ) -> None:
        self.split, self.segments, self.plan = split, segments, plan
        self.tensors, self.report = tensors, report
        self.graph = Graph()
        self.root = torch.nn.Module()
        self.inputs: dict[Input, Node] = {}
        self.examples: dict[Input, Tensor] = {}
        self.branches: dict[tuple[Any, ...], tuple[str, str]] = {}
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)

    def build(self) -> Segment:
        plan, call = self.plan, self.graph.call_function
        sides = self._prelude()
        draft = self._input(
            Input("draft", "draft"), torch.zeros(1, plan.draft_tokens, dtype=torch.long)
        )
        layers = torch.zeros(plan.num_layers + 1)
        active = self._input(Input("draft", "active"), layers.bool())
        threshold = self._input(Input("draft", "threshold"), layers)
        # a node of its own for each: one that is two operands gets one name twice from export
        token, exit_layer = (
            call(torch.ops.aten.full.default, ((1,), -1), {"dtype": torch.long}) for _ in range(2)
        )
        nothing = call(torch.ops.aten.full.default, ((1, plan.draft_tokens), 0.0))
        false = call(torch.ops.aten.full.default, ((), False), {"dtype": torch.bool})
        state = [sides["hidden"], draft, nothing, false, token, exit_layer]
        for index in range(plan.num_layers):
            state = self._layer(index, state, sides, active, threshold)
            self.report.rewritten += 1
        token, exit_layer = self._head(state)
        self.graph.output((token, exit_layer, state[0]))
        hoist_placeholders(self.graph, list(self.inputs.values()))
        module = GraphModule(self.root, self.graph)
        module.graph.lint()
        return Segment(module, tuple(self.inputs), "")

    def _input(self, role: Input, example: Tensor) -> Node:
        if role not in self.inputs:
            name = f"{role.kind}_{role.name}".replace(".", "_")
            self.inputs[role] = self.graph.placeholder(name)
            self.examples[role] = example
        return self.inputs[role]

    def _prelude(self) -> dict[str, Node]:
        found: dict[str, Node] = {}
        for segment, names in (
            (self.split.embed, self.split.embed_outputs),
            (self.split.positional, self.split.side_outputs),
        ):
            placeholders = segment.graph.graph.find_nodes(op="placeholder")
            known = {
                node: self._input(role, node.meta["val"])
                for node, role in zip(placeholders, segment.inputs, strict=True)
            }
            result = self.graph.graph_copy(segment.graph.graph, known)
            values = result if isinstance(result, (tuple, list)) else (result,)
            outputs = segment.graph.graph.output_node().all_input_nodes
            for name, value, source in zip(names, values, outputs, strict=True):
                found[name] = value
                value.meta = dict(source.meta)
        return found

    def _layer(
        self, index: int, state: list[Node], sides: dict[str, Node], active: Node, threshold: Node
    ) -> list[Node]:
        boundary = index + 1
        layer = self.split.layers[index]
        predictor = self.segments.predictors.get(boundary)
        drafts = boundary == self.plan.draft_layer
        call = self.graph.call_function
        number = call(torch.ops.aten.full.default, ((1,), boundary), {"dtype": torch.long})
        is_active = call(torch.ops.aten.select.int, (active, 0, boundary))
        limit = call(torch.ops.aten.select.int, (threshold, 0, boundary))

        used = [layer]
        if drafts:
            used += [self.segments.normed, self.segments.draft]
        if predictor is not None:
            used += [predictor, self.segments.verify]
        operands, positions = self._operands(used, sides)
        hot = self._input(Input("parameter", "hot.ids"), self.tensors["hot.ids"])
        extra = [is_active, limit, number, hot, *operands.values()]
        key = (layer.structure, predictor.structure if predictor else "", drafts)
        if key not in self.branches:
            self.branches[key] = self._trace_branches(
                index, used, positions, drafts, operands, sides
            )
        run, skip = self.branches[key]
        out = call(
            cond,
            (
                state[3],
                self.graph.get_attr(skip),
                self.graph.get_attr(run),
                (*state, *extra),
            ),
        )
        return [call(operator.getitem, (out, place)) for place in range(STATE)]

    def _operands(
        self, used: Sequence[Segment], sides: dict[str, Node]
    ) -> tuple[dict[Input, Node], list[list[int]]]:
        """Nodes of all inputs of ``used`` but hidden, draft, previous; and where each finds its own
        (−1, −2, −3 for those three)."""
        special = {"hidden": -1, "draft": -2, "previous": -3}
        operands: dict[Input, Node] = {}
        positions = []
        for segment in used:
            mine = []
            placeholders = segment.graph.graph.find_nodes(op="placeholder")
            for role, placeholder in zip(segment.inputs, placeholders, strict=True):
                if role.kind in special:
                    mine.append(special[role.kind])
                    continue
                if role not in operands:
                    node = (
                        sides[role.name]
                        if role.kind == "side"
                        else self._input(role, placeholder.meta["val"])
                    )
                    operands[role] = node
                mine.append(list(operands).index(role))
            positions.append(mine)
        return operands, positions

    def _trace_branches(
        self,
        index: int,
        used: Sequence[Segment],
        positions: list[list[int]],
        drafts: bool,
        operands: dict[Input, Node],
        sides: dict[str, Node],
    ) -> tuple[str, str]:
        layer, rest = used[0], list(zip(used[1:], positions[1:], strict=True))
        plan = self.plan
        fill = self.split.kv_fills[index]
        fill_places = [
            -1 if role.kind == "hidden" else list(operands).index(role) for role in fill.inputs
        ]

        def arguments(
            places: Sequence[int], params: Sequence[Tensor], special: Any
        ) -> list[Tensor]:
            return [special[place] if place < 0 else params[place] for place in places]

        def run(
            hidden: Tensor, draft: Tensor, previous: Tensor, done: Tensor, token: Tensor,
            exit_layer: Tensor, active: Tensor, limit: Tensor, number: Tensor, hot: Tensor,
            *params: Tensor,
        ) -> Any:  # fmt: skip
            hidden = layer.graph(*arguments(positions[0], params, {-1: hidden}))
            parts = list(rest)
            if drafts:
                (normed, at), (logits, at_logits) = parts[:2]
                parts = parts[2:]
                z = normed.graph(*arguments(at, params, {-1: hidden}))
                ranked = logits.graph(*arguments(at_logits, params, {-1: z}))
                draft = hot[ranked[0].topk(plan.draft_tokens, -1).indices]
            if parts:
                (predictor, at), (verify, at_verify) = parts
                special = {-1: hidden, -2: draft, -3: previous}
                probability, now, z = predictor.graph(*arguments(at, params, special))
                best = verify.graph(*arguments(at_verify, params, {-1: z}))[0].argmax(-1)
                answer = hot[best] if plan.verify == "hot" else best
                accepted = active & (probability > limit) & (answer[:, None] == draft).any(-1)
                previous = torch.where(active, now, previous)
                token = torch.where(accepted, answer, token)
                exit_layer = torch.where(accepted, number, exit_layer)
                done = accepted[0].clone()
            fresh = (draft, previous, done, token, exit_layer)
            return (hidden, *(value.clone() for value in fresh))

        def skip(*values: Tensor) -> Any:
            state, params = values[:STATE], values[STATE + 4 :]
            if plan.kv_policy == "propagate":
                fill.graph(*arguments(fill_places, params, {-1: state[0]}))
            return tuple(value.clone() for value in state)

        hidden = layer.graph.graph.output_node().all_input_nodes[0].meta["val"]
        k = plan.draft_tokens
        examples = [
            hidden, torch.zeros(1, k, dtype=torch.long), torch.zeros(1, k), torch.tensor(False),
            torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long),
            torch.tensor(True), torch.tensor(0.5), torch.zeros(1, dtype=torch.long),
            self.tensors["hot.ids"],
        ]  # fmt: skip
        examples += [
            node.meta["val"] if role.kind == "side" else self.examples[role]
            for role, node in operands.items()
        ]
        names = f"layer_{len(self.branches)}", f"pass_{len(self.branches)}"
        functions: tuple[Callable[..., Any], ...] = (run, skip)
        for name, function in zip(names, functions, strict=True):
            setattr(self.root, name, self._trace(function, examples))
        return names

    def _head(self, state: list[Node]) -> tuple[Node, Node]:
        head = self.split.head.whole
        operands, positions = self._operands([head], {})
        depth = self.plan.num_layers

        def full(hidden: Tensor, token: Tensor, exit_layer: Tensor, *params: Tensor) -> Any:
            values = [hidden if place < 0 else params[place] for place in positions[0]]
            best = head.graph(*values)[0].float().argmax(-1)
            return best, torch.full_like(best, depth)

        def keep(hidden: Tensor, token: Tensor, exit_layer: Tensor, *params: Tensor) -> Any:
            return token.clone(), exit_layer.clone()

        one = torch.zeros(1, dtype=torch.long)
        hidden = self.split.layers[-1].graph.graph.output_node().all_input_nodes[0].meta["val"]
        examples = [hidden, one, one, *(self.examples[role] for role in operands)]
        self.root.head = self._trace(full, examples)
        self.root.keep = self._trace(keep, examples)
        call = self.graph.call_function
        out = call(
            cond,
            (
                state[3],
                self.graph.get_attr("keep"),
                self.graph.get_attr("head"),
                (state[0], state[4], state[5], *operands.values()),
            ),
        )
        return call(operator.getitem, (out, 0)), call(operator.getitem, (out, 1))

    def _trace(self, function: Callable[..., Any], examples: Sequence[Tensor]) -> GraphModule:
        with self.mode:
            fakes = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype) for x in examples]
        with torch.no_grad():
            return make_fx(function, pre_dispatch=True)(*fakes)
