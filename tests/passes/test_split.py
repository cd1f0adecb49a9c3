"""Splitting, fitting to other row counts, and taking the head apart."""

import pytest
import torch
from models import FAMILIES, tiny_model

from eepass.errors import PassError
from eepass.passes.pipeline import SPLIT, TRACED, split_decoder
from eepass.passes.report import PassReport
from eepass.passes.runner import PassRunner
from eepass.passes.split.check import computes_as
from eepass.passes.split.fit_rows import fit_rows
from eepass.passes.trace.decode_step import decode_step, trace_decode_step


@pytest.fixture(scope="module")
def traces(llama):
    return {rows: split_decoder(llama, rows, 48)[0] for rows in (4, 8, 16)}


def traced(model, rows):
    return PassRunner(PassReport()).run(trace_decode_step(model, rows, 48), TRACED)


def test_fitted_segments_equal_traced_ones(llama, traces):
    fitted = fit_rows(traces[8], PassReport(), many=traces[16], rows=4)
    for own, wanted in zip(fitted.layers, traces[4].layers, strict=True):
        assert own.inputs == wanted.inputs
        assert own.graph.code == wanted.graph.code
    assert fitted.embed.graph.code == traces[4].embed.graph.code
    computes_as(traced(llama, 4))(fitted)


def test_traces_that_differ_in_more_than_numbers_are_refused(traces):
    one = split_decoder(tiny_model("gpt2"), 8, 48)[0]
    with pytest.raises(PassError, match="differ in their operators"):
        fit_rows(one, PassReport(), many=traces[16], rows=4)


def test_a_split_that_computes_something_else_is_noticed(llama):
    decoder = traced(llama, 1)
    check = computes_as(decoder)
    split = PassRunner(PassReport()).run(decoder, SPLIT)
    check(split)
    norm = next(
        n for n in split.layers[2].graph.graph.nodes if n.target is torch.ops.aten.rsqrt.default
    )
    norm.target = torch.ops.aten.sqrt.default
    split.layers[2].graph.recompile()
    with pytest.raises(PassError, match="other logits"):
        check(split)


def test_kv_fill_writes_what_the_layer_writes(llama, traces):
    split = split_decoder(llama, 1, 48)[0]
    layer, fill = split.layers[1], split.kv_fills[1]
    assert len(list(fill.graph.graph.nodes)) < len(list(layer.graph.graph.nodes))
    written = []
    for segment in (layer, fill):
        torch.manual_seed(3)
        values = {}
        for role, meta in sorted(segment.examples.items(), key=lambda pair: pair[0].name):
            if role.kind == "parameter":
                values[role] = split.tensors[role.name].detach()
            elif role.kind in ("keys", "values", "slots"):
                values[role] = torch.zeros(meta.shape, dtype=meta.dtype)
            else:
                values[role] = torch.full(meta.shape, 0.3)
        segment.run(values.__getitem__)
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


def test_an_error_names_the_passes_that_ran(llama):
    def break_it(decoder, report):
        first, *_, last, _ = (n for n in decoder.graph.graph.nodes if n.op != "placeholder")
        first.args = (last, *first.args[1:])
        return decoder

    decoder = traced(llama, 1)
    with pytest.raises(RuntimeError) as failed:
        PassRunner(PassReport()).run(decoder, [break_it, *SPLIT])
    assert failed.value.__notes__ == ["passes that ran, the last first: break_it"]


def test_what_a_pass_changes_is_noticed_and_written_down(llama, tmp_path):
    def forget_the_scale(decoder, report):
        node = decoder.graph.graph.find_nodes(
            op="call_function", target=torch.ops.aten.rsqrt.default
        )[0]
        node.target = torch.ops.aten.sqrt.default
        report.rewritten += 1
        report.skip(node, "its name")
        return decoder

    decoder, report = traced(llama, 1), PassReport()
    runner = PassRunner(report, tmp_path, "1-rows")
    with pytest.raises(PassError, match="other logits"):
        runner.run(decoder, [forget_the_scale, *SPLIT], computes_as(decoder))
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files[:2] == ["1-rows.1-captured.py", "1-rows.2-forget_the_scale.py"]
    assert len(files) == 2 + len(SPLIT)
    text = (tmp_path / files[1]).read_text()
    assert "# rewritten: 1" in text and "its name" in text and "aten.sqrt" in text
    # each pass counts for itself, the report for all
    assert report.rewritten > 1 and report.notes


def test_side_inputs_of_all_layers_are_computed_once(llama):
    """Without the pass, layers have some of their own."""
    whole = PassRunner(PassReport()).run(traced(llama, 1), SPLIT)
    without = [each for each in SPLIT if each.__name__ != "merge_equal_prelude"]
    apart = PassRunner(PassReport()).run(traced(llama, 1), without)
    assert len(whole.side_outputs) == 3 < len(apart.side_outputs)
