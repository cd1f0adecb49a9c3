"""Make the tensors a model builds from Python numbers inputs, so that segments own none.

before   c = self._tensor_constant0
after    c = placeholder, the parameter ``constant.<n>``
"""

from __future__ import annotations

from dataclasses import replace

from eepass.passes.graph_walk import replace_node
from eepass.passes.report import PassReport
from eepass.segments import DecoderGraph, Input


def lift_constants(decoder: DecoderGraph, report: PassReport) -> DecoderGraph:
    traced, tensors, inputs = decoder.graph, dict(decoder.tensors), list(decoder.inputs)
    # tracing may have found some already
    first = sum(name.startswith("constant.") for name in tensors)
    for number, node in enumerate(traced.graph.find_nodes(op="get_attr"), first):
        name = f"constant.{number}"
        tensors[name] = getattr(traced, str(node.target))
        with traced.graph.inserting_after(list(decoder.roles)[-1]):
            placeholder = traced.graph.placeholder(name.replace(".", "_"))
        placeholder.meta = {**node.meta, "val": tensors[name]}
        replace_node(node, placeholder)
        inputs.append(Input("parameter", name))
        decoder = replace(decoder, inputs=tuple(inputs), tensors=tensors)
        report.rewritten += 1
    return decoder
