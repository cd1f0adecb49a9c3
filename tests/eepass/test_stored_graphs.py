"""Graphs as data: what is read back is what was written, and nothing but operators is."""

import dataclasses
import json
import operator

import pytest
import torch

from eepass.runtime.decoder.decoder import Decoder
from eepass.runtime.decoder.side_inputs import Row
from eepass.segments import Head, Input, Segment
from eepass.stored_graphs import GraphReader, GraphWriter, NotStorable


@pytest.fixture(scope="module")
def read_back(llama_splits):
    writer = GraphWriter()
    stored = [writer.parts(split) for split in llama_splits.values()]
    text = json.dumps({"splits": stored, "graphs": writer.graphs})
    data = json.loads(text)
    reader = GraphReader(data["graphs"])
    tensors = llama_splits[1].tensors
    return {split["rows"]: reader.split(split, tensors) for split in data["splits"]}


def test_segments_are_the_same(llama_splits, read_back):
    assert sorted(read_back) == sorted(llama_splits)
    for rows, split in llama_splits.items():
        other = read_back[rows]
        assert other.distinct_layers == split.distinct_layers
        assert other.hidden_size == split.hidden_size
        assert other.windows == split.windows
        for one, two in zip(
            (split.embed, split.positional, split.head.whole, *split.layers, *split.kv_fills),
            (other.embed, other.positional, other.head.whole, *other.layers, *other.kv_fills),
            strict=True,
        ):
            assert two.inputs == one.inputs and two.structure == one.structure
            targets = [[n.target for n in p.graph.graph.nodes if n.op == "call_function"]
                       for p in (one, two)]  # fmt: skip
            assert targets[0] == targets[1]


@pytest.mark.parametrize("pick", (lambda split: split, lambda split: split.head))
def test_no_field_is_forgotten(llama_splits, read_back, pick):
    written, read = pick(llama_splits[1]), pick(read_back[1])
    for name in (field.name for field in dataclasses.fields(written)):
        one, two = getattr(written, name), getattr(read, name)
        if isinstance(one, Segment):
            assert two.structure == one.structure, name
        elif isinstance(one, tuple) and isinstance(one[0], Segment):
            assert [s.structure for s in two] == [s.structure for s in one], name
        elif name != "tensors" and not isinstance(one, Head):
            assert two == one, name


def test_a_part_of_another_type_is_not_written(llama_splits):
    odd = dataclasses.replace(llama_splits[1], layers_found_by=object())
    with pytest.raises(NotStorable, match="object"):
        GraphWriter().parts(odd)


def test_they_decode_to_the_same_bits(llama_splits, read_back):
    from models import eager_compile

    found = []
    for splits in (llama_splits, read_back):
        decoder = Decoder(splits, eager_compile)
        rows = [Row(0, at, at) for at in range(6)]
        hidden = decoder.forward([5, 9, 40, 7, 12, 33], rows, decoder.cache_length)
        found.append((hidden, decoder.splits[1].head.normed(hidden, decoder.tensors)))
        found[-1] += (decoder.kv.values[3], decoder.side_inputs.gather(rows, 8).sides["side.0"])
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)


def _segment(build):
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    graph.output(build(graph, x))
    module = torch.fx.GraphModule(torch.nn.Module(), graph)
    return Segment(module, (Input("hidden", "hidden"),), "s")


def test_code_of_others_is_not_written_and_not_read():
    writer = GraphWriter()
    with pytest.raises(NotStorable, match="system"):
        import os

        writer.segment(_segment(lambda graph, x: graph.call_function(os.system, ("true",))))
    with pytest.raises(NotStorable, match="complex"):
        writer.segment(_segment(lambda graph, x: graph.call_function(operator.getitem, (x, 1j))))
    good = writer.segment(_segment(lambda graph, x: graph.call_function(operator.getitem, (x, 0))))
    assert GraphReader(writer.graphs).segment(good).graph([7, 8]) == 7
    for change in (
        {"op": "placeholder", "name": "x): __import__('os').system('true') #"},
        {"op": "call_function", "target": "os.system.default"},
    ):
        entry = {"args": [], "kwargs": {}, "val": None, **change}
        with pytest.raises(NotStorable):
            GraphReader({"s": [entry]}).segment(good)
