"""Decode and prompt steps as ONNX graphs: a chain of calls of functions, each exported once.

Functions go through PyTorch's exporter with all they read as inputs, weights included, and are
inlined at the end. So the time an export takes grows with the distinct layers of a model, not with
its depth.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eepass.passes.exits.step_builder import Call, Function, unaliased

# what ONNX Runtime's CPU build has run for years; attention and norms are spelled out
OPSET = 20
IR_VERSION = 10
# of functions, until they are inlined
DOMAIN = "eepass"


@dataclass(frozen=True, slots=True)
class OnnxValue:
    """A value of the graph, and a tensor of its shape and dtype."""

    value: Any
    like: Tensor


class OnnxBuilder:
    """A ``Builder`` of one ONNX graph; ``tensors`` are the weights it may read, by name."""

    def __init__(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        import onnx_ir

        self.ir, self.tensors = onnx_ir, tensors
        opsets = {"": OPSET, DOMAIN: 1}
        self.graph = onnx_ir.Graph([], [], nodes=[], name=name, opset_imports=opsets)
        self._weights: dict[str, OnnxValue] = {}
        self._constants: dict[str, OnnxValue] = {}
        self._functions: dict[Hashable, tuple[Any, list[Tensor]]] = {}
        self._count = 0

    def input(self, name: str, like: Tensor, default: bool = False) -> OnnxValue:
        """An input; with ``default``, ``like`` is its value where it is not given."""
        given = self._initializer(name, like) if default else self._value(name, like)
        self.graph.inputs.append(given.value)
        return given

    def weight(self, name: str) -> OnnxValue:
        if name not in self._weights:
            self._weights[name] = self._initializer(name, self.tensors[name].detach())
        return self._weights[name]

    def constant(self, tensor: Tensor) -> OnnxValue:
        key = f"{tensor.dtype} {tensor.tolist()}"
        if key not in self._constants:
            name = f"constant_{len(self._constants)}"
            self._constants[key] = self._initializer(name, tensor)
        return self._constants[key]

    def call(self, call: Call) -> list[OnnxValue]:
        node, results = self._call(call)
        self.graph.append(node)
        return results

    def branch(
        self, condition: OnnxValue, then: Call | Sequence[OnnxValue],
        otherwise: Call | Sequence[OnnxValue],
    ) -> list[OnnxValue]:  # fmt: skip
        ir, branches = self.ir, []
        results: list[OnnxValue] = []
        for name, case in (("then_branch", then), ("else_branch", otherwise)):
            if isinstance(case, Call):
                node, results = self._call(case)
                nodes = [node]
            else:
                nodes = [ir.Node("", "Identity", [each.value]) for each in case]
                pairs = zip(nodes, case, strict=True)
                results = [self._results(node, [each.like])[0] for node, each in pairs]
            outputs = [result.value for result in results]
            body = ir.Graph([], outputs, nodes=nodes, name=f"{name}_{self._count}")
            branches.append(ir.AttrGraph(name, body))
        node = ir.Node("", "If", [condition.value], branches, num_outputs=len(results))
        results = self._results(node, [result.like for result in results])
        self.graph.append(node)
        return results

    def finish(self, outputs: Mapping[str, OnnxValue]) -> Any:
        """The model, in standard operators only; constants and weights are initialisers of the
        outermost graph."""
        import onnx_ir.passes.common as passes

        for name, output in outputs.items():
            output.value.name = name
            self.graph.outputs.append(output.value)
        functions = [function for function, _ in self._functions.values()]
        model = self.ir.Model(
            self.graph, ir_version=IR_VERSION, producer_name="eepass", functions=functions
        )
        with _quiet():
            for each in (
                passes.InlinePass(),
                passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
                passes.LiftSubgraphInitializersToMainGraphPass(),
                passes.DeduplicateInitializersPass(),
                passes.RemoveUnusedNodesPass(),
                passes.RemoveUnusedOpsetsPass(),
                # a branch may not return a value from outside of it
                passes.OutputFixPass(),
                passes.NameFixPass(),
                # they name the source files of each operator
                passes.ClearMetadataAndDocStringPass(),
            ):
                each(model)
        return model

    def _call(self, call: Call) -> tuple[Any, list[OnnxValue]]:
        if call.key not in self._functions:
            examples = [each.like for each in call.operands]
            self._functions[call.key] = self._exported(call.function, examples)
        function, likes = self._functions[call.key]
        inputs = [each.value for each in call.operands]
        node = self.ir.Node(DOMAIN, function.name, inputs, num_outputs=len(likes))
        return node, self._results(node, likes)

    def _exported(self, function: Function, examples: list[Tensor]) -> tuple[Any, list[Tensor]]:
        """``function`` as an ONNX function of as many inputs as there are examples."""
        # the exporter merges inputs that are the same tensor
        seen: set[int] = set()
        for place, example in enumerate(examples):
            if id(example) in seen:
                examples[place] = example.clone()
            seen.add(id(example))
        module = _Module(function)
        with torch.no_grad(), _quiet():
            results = list(module(*examples))
            program = torch.onnx.export(
                module, tuple(examples), opset_version=OPSET, dynamo=True, verbose=False
            )
        assert program is not None
        graph, ir = program.model.graph, self.ir
        for constant in list(graph.initializers.values()):
            tensor = constant.const_value
            node = ir.Node("", "Constant", [], [ir.AttrTensor("value", tensor)], num_outputs=1)
            constant.replace_all_uses_with(node.outputs[0], replace_graph_outputs=True)
            graph.insert_before(graph[0], node)
        graph.initializers.clear()
        name = f"function_{len(self._functions)}"
        return ir.Function(DOMAIN, name, graph=graph, attributes=[]), results

    def _initializer(self, name: str, tensor: Tensor) -> OnnxValue:
        made = self._value(name, tensor)
        made.value.const_value = self.ir.Tensor(tensor.contiguous().numpy(), name=name)
        self.graph.register_initializer(made.value)
        return made

    def _results(self, node: Any, likes: Sequence[Tensor]) -> list[OnnxValue]:
        """The results of ``node``, named and typed."""
        node.name = f"step_{self._count}"
        for index, (value, like) in enumerate(zip(node.outputs, likes, strict=True)):
            value.name = f"value_{self._count}_{index}"
            value.dtype = self.ir.tensor_adapters.from_torch_dtype(like.dtype)
            value.shape = self.ir.Shape(like.shape)
        self._count += 1
        return list(map(OnnxValue, node.outputs, likes))

    def _value(self, name: str, like: Tensor) -> OnnxValue:
        ir = self.ir
        kind = ir.TensorType(ir.tensor_adapters.from_torch_dtype(like.dtype))
        return OnnxValue(ir.Value(name=name, shape=ir.Shape(like.shape), type=kind), like)


class _Module(torch.nn.Module):
    """A function for the exporter."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, *operands: Tensor) -> tuple[Tensor, ...]:
        return unaliased(self.function(*operands))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide the exporters' progress and advice."""
    logs = [logging.getLogger(name) for name in ("torch.onnx", "onnx_ir", "onnxscript")]
    levels = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)
