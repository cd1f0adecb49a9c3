"""Traces of a model's first layers stand for traces of all, or are refused."""

import pytest
import torch
from models import FAMILIES, tiny_model

from eepass.errors import PassError
from eepass.passes.pipeline import split_decoder, split_for_rows
from eepass.passes.report import PassReport
from eepass.passes.split.repeat_layers import layers_needed, repeat_layers
from eepass.passes.trace.first_layers import first_layers


def parts(split):
    return (split.embed, split.positional, split.head.whole, *split.layers, *split.kv_fills)


@pytest.mark.parametrize("family", FAMILIES)
def test_repeated_layers_are_what_tracing_all_gives(family):
    model = tiny_model(family)
    splits, report = split_for_rows(model, 64, (1, 4), 8)
    assert not any("all layers" in note for note in report.notes)
    for rows in (4, 8):
        whole, _ = split_decoder(model, rows, 64)
        for ours, theirs in zip(parts(splits[rows]), parts(whole), strict=True):
            assert ours.inputs == theirs.inputs and ours.structure == theirs.structure
        assert splits[rows].side_outputs == whole.side_outputs
        assert splits[rows].tensors is splits[1].tensors


def test_first_layers_share_the_modules_and_leave_the_model_alone():
    model = tiny_model("gemma3")
    small = first_layers(model, 2)
    assert len(small.model.layers) == 2 and small.config.num_hidden_layers == 2
    assert small.config.layer_types == model.config.layer_types[:2]
    assert small.model.layers[1] is model.model.layers[1]
    assert len(model.model.layers) == model.config.num_hidden_layers == 4
    assert model.config is model.model.config and len(model.config.layer_types) == 4


def test_a_model_whose_layers_depend_on_their_number_is_traced_whole():
    """Such as one whose last layers read what an earlier one made."""
    model = tiny_model("llama")

    class Counting(type(model.model)):
        def forward(self, *arguments, **options):
            found = super().forward(*arguments, **options)
            found.last_hidden_state = found.last_hidden_state * float(len(self.layers))
            return found

    model.model.__class__ = Counting
    one = split_decoder(model, 1, 64)[0]
    first = split_decoder(first_layers(model, 2), 1, 64)[0]
    with pytest.raises(PassError, match="others"):
        repeat_layers(first, PassReport(), first=first, whole=one)
    splits, report = split_for_rows(model, 64, (1, 4), 8)
    assert any("all layers are traced" in note for note in report.notes)
    whole = split_decoder(model, 4, 64)[0]
    assert [p.structure for p in parts(splits[4])] == [p.structure for p in parts(whole)]


def test_kinds_of_layers_are_all_among_the_first():
    split = split_decoder(tiny_model("gemma3"), 1, 64)[0]
    assert layers_needed(split) == 2
    types = ["sliding_attention"] * 3 + ["full_attention"]
    later = split_decoder(tiny_model("gemma3", layer_types=types), 1, 64)[0]
    assert layers_needed(later) == 4


def test_a_mistake_in_the_first_layers_is_noticed(monkeypatch):
    from eepass.passes import pipeline

    def forget_the_scale(decoder, report):
        if decoder.rows > 1:
            node = decoder.graph.graph.find_nodes(
                op="call_function", target=torch.ops.aten.rsqrt.default
            )[0]
            node.target = torch.ops.aten.sqrt.default
        return decoder

    monkeypatch.setattr(pipeline, "SPLIT", (forget_the_scale, *pipeline.SPLIT))
    with pytest.raises(PassError, match="other logits"):
        split_for_rows(tiny_model("llama"), 64, (1, 4), 8)
