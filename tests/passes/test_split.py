"""Splitting, fitting to other row counts, and taking the head apart."""

import pytest
import torch
from models import FAMILIES, tiny_model

from eepass.errors import PassError
from eepass.passes.pipeline import split_decoder
from eepass.passes.report import PassReport
from eepass.passes.split.check import check_split
from eepass.passes.split.find_layers import find_layers
from eepass.passes.split.fit_rows import fit_rows
from eepass.passes.split.split_segments import split_segments
from eepass.passes.trace.decode_step import decode_step, trace_decode_step


@pytest.fixture(scope="module")
def traces(llama):
    return {rows: split_decoder(llama, rows, 48)[0] for rows in (4, 8, 16)}


def test_fitted_segments_equal_traced_ones(llama, traces):
    fitted = fit_rows(traces[8], traces[16], 4)
    for own, traced in zip(fitted.layers, traces[4].layers, strict=True):
        assert own.inputs == traced.inputs
        assert own.graph.code == traced.graph.code
    assert fitted.embed.graph.code == traces[4].embed.graph.code
    check_split(trace_decode_step(llama, 4, 48), fitted)


def test_traces_that_differ_in_more_than_numbers_are_refused(traces):
    one = split_decoder(tiny_model("gpt2"), 8, 48)[0]
    with pytest.raises(PassError, match="differ in their operators"):
        fit_rows(one, traces[16], 4)


def test_a_split_that_computes_something_else_is_noticed(llama):
    decoder = trace_decode_step(llama, 1, 48)
    split = split_segments(decoder, find_layers(decoder, PassReport()), PassReport())
    check_split(decoder, split)
    norm = next(
        n for n in split.layers[2].graph.graph.nodes if n.target is torch.ops.aten.rsqrt.default
    )
    norm.target = torch.ops.aten.sqrt.default
    split.layers[2].graph.recompile()
    with pytest.raises(PassError, match="other logits"):
        check_split(decoder, split)


def test_kv_fill_writes_what_the_layer_writes(llama, traces):
    split = split_decoder(llama, 1, 48)[0]
    layer, fill = split.layers[1], split.kv_fills[1]
    assert len(list(fill.graph.graph.nodes)) < len(list(layer.graph.graph.nodes))
    written = []
    for segment in (layer, fill):
        torch.manual_seed(3)
        values = {}
        for node, role in sorted(
            zip(segment.graph.graph.find_nodes(op="placeholder"), segment.inputs, strict=True),
            key=lambda pair: pair[1].name,
        ):
            meta = node.meta["val"]
            if role.kind == "parameter":
                values[role] = split.tensors[role.name].detach()
            elif role.kind in ("keys", "values", "slots"):
                values[role] = torch.zeros(meta.shape, dtype=meta.dtype)
            else:
                values[role] = torch.full(meta.shape, 0.3)
        segment.graph(*(values[role] for role in segment.inputs))
        written.append({r.name: v for r, v in values.items() if r.kind in ("keys", "values")})
    assert written[0].keys() == written[1].keys()
    for name, value in written[0].items():
        assert value.abs().sum() > 0
        assert torch.equal(value, written[1][name])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_comes_apart(family):
    head = split_decoder(tiny_model(family), 1, 32)[0].head
    assert head.reason == "" and head.weight and head.norm is not None


def test_a_head_with_two_linear_layers_stays_whole(llama):
    llama = tiny_model("llama")
    llama.lm_head = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 160)).eval()
    head = split_decoder(llama.requires_grad_(False), 1, 32)[0].head
    assert head.norm is None and "2 linear layers" in head.reason


def test_encoder_decoders_and_state_spaces_are_refused():
    from transformers import MambaConfig, MambaForCausalLM, T5Config, T5ForConditionalGeneration

    sizes = {
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 32,
        "num_layers": 1,
        "num_heads": 2,
        "vocab_size": 50,
    }
    with pytest.raises(PassError, match="encoder-decoder"):
        decode_step(T5ForConditionalGeneration(T5Config(**sizes)), 32)
    config = MambaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, state_size=4)
    with pytest.raises(PassError, match=r"Mamba|recurrent|state"):
        decode_step(MambaForCausalLM(config), 32)


def test_sliding_windows_live_in_the_mask():
    split = split_decoder(tiny_model("gemma3"), 4, 32)[0]
    assert split.windows == {"full_attention": None, "sliding_attention": 8}
    assert all(layer.structure == split.layers[0].structure for layer in split.layers)
    masks = [{r.name for r in layer.inputs if r.kind == "side"} for layer in split.layers]
    assert masks[0] == masks[2] != masks[1] == masks[3]
