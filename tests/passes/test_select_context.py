"""Layers that attend to selected slots: the same with all of them, none that were not selected."""

from dataclasses import replace

import pytest
import torch
from models import FAMILIES, tiny_model

from eepass.errors import PassError
from eepass.passes.pipeline import context_layers, split_decoder
from eepass.passes.report import PassReport
from eepass.passes.split.check import computes_as
from eepass.passes.split.select_context import ATTENTION
from eepass.segments import CONTEXT, HIDDEN

ROWS, SLOTS = 3, 48
allow_selected = torch.ops.eepass.allow_selected.default


def selected(model, tokens=24, report=None):
    split = split_decoder(model, ROWS, SLOTS)[0]
    found = context_layers(split, tokens, (0.2, 0.6), report or PassReport())
    return split, replace(split, layers=found.layers), found.queries


def given(split, position, slots, seed=0):
    """The inputs of a pass at ``position`` over a random cache, for rows that see ``slots``."""
    generator = torch.Generator().manual_seed(seed)
    positions = torch.arange(position, position + ROWS)
    mask = torch.arange(SLOTS) <= positions[:, None]
    known = {"ids": torch.tensor([[5, 9, 7]]), "positions": positions[None], "slots": positions}
    cache = {}

    def value_of(role):
        if role == CONTEXT:
            return slots
        if role.kind == "parameter":
            return split.tensors[role.name].detach()
        if role.kind == "mask":
            forbidden = torch.finfo(torch.float32).min
            return torch.zeros(1, 1, ROWS, SLOTS).masked_fill(~mask, forbidden)
        if role.kind in ("keys", "values") and role not in cache:
            shape = next(e[role].shape for e in (one.examples for one in split.layers) if role in e)
            cache[role] = torch.randn(shape, generator=generator)
        return cache[role] if role in cache else known[role.kind]

    return value_of, cache


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"gemma3"}))
def test_all_slots_give_the_bits_of_dense_attention(family):
    report = PassReport()
    split, made, queries = selected(tiny_model(family), report=report)
    everything = torch.full((ROWS, 24), -1, dtype=torch.int32)
    everything[:, :13] = torch.arange(13)
    with torch.no_grad():
        wanted = split.run(given(split, 10, None)[0])
        assert torch.equal(made.run(given(made, 10, everything)[0]), wanted)
        everything[:, 4] = -1
        assert not torch.equal(made.run(given(made, 10, everything)[0]), wanted)
    assert report.rewritten == split.distinct_layers == made.distinct_layers
    assert all(layer.inputs[-1] == CONTEXT for layer in made.layers)
    assert list(queries) == [1, 3]
    # what it was made of is as it was
    assert not any(layer.graph.graph.find_nodes(op="call_function", target=allow_selected)
                   for layer in split.layers)  # fmt: skip
    computes_as(split)(split)


def test_what_is_not_selected_is_not_attended_to():
    _, made, _ = selected(tiny_model("llama"))
    slots = torch.tensor([[0, 1, 7, 10, 11, 12]] * ROWS, dtype=torch.int32)
    found = []
    for rubbish in (0.0, 50.0):
        value_of, cache = given(made, 10, slots)
        for layer in made.layers:
            for role in layer.inputs:
                if role.kind in ("keys", "values"):
                    value_of(role)[:, :, [2, 3, 4, 5, 6, 8, 9]] += rubbish
        assert cache
        with torch.no_grad():
            found.append(made.run(value_of))
    assert torch.equal(*found)


class Reading(torch.fx.Interpreter):
    """Runs a graph, and keeps what every node gives."""

    def run_node(self, node):
        self.seen = getattr(self, "seen", {})
        self.seen[node] = super().run_node(node)
        return self.seen[node]


@pytest.mark.parametrize("family", FAMILIES)
def test_queries_are_those_that_attention_gets(family):
    split, _, queries = selected(tiny_model(family))
    value_of, _ = given(split, 10, None)
    with torch.no_grad():
        made = split.prelude(value_of)
        for number, layer in enumerate(split.layers):
            reading = Reading(layer.graph)
            inputs = layer.arguments(lambda role: made[role] if role in made else value_of(role))
            hidden = reading.run(*inputs)
            if query := queries.get(number):
                (call,) = layer.graph.graph.find_nodes(op="call_function", target=ATTENTION)
                found = query.segment.run(lambda r: made[r] if r in made else value_of(r))[0]
                assert torch.equal(found, reading.seen[call.args[0]])
                assert query.keys.layer == number
                assert query.scale == (call.kwargs.get("scale") or found.shape[-1] ** -0.5)
            made[HIDDEN] = hidden


def test_layers_with_a_window_of_their_own_are_left_alone():
    report = PassReport()
    split, made, queries = selected(tiny_model("gemma3"), report=report)
    assert [layer.inputs[-1] == CONTEXT for layer in made.layers] == [False, True] * 2
    assert made.layers[0] is split.layers[0] and list(queries) == [1, 3]
    assert report.skipped == [
        (f"layer {n}", "it attends to a window of 8 tokens") for n in (0, 2)
    ]  # fmt: skip


def test_attention_that_is_not_recognised_is_refused():
    with pytest.raises(PassError, match="layer 0 reads its keys or values otherwise"):
        selected(tiny_model("llama", attn_implementation="eager"))
