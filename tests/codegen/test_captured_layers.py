"""What layers of captured steps call on a GPU: our kernels, run in the interpreter."""

import pytest
import torch
from models import eager_compile, random_artifact, tiny_model

from eepass.codegen.lower_cuda import CudaCompiler
from eepass.model import EarlyExitModel
from eepass.passes.pipeline import split_for_rows
from eepass.passes.report import PassReport
from eepass.runtime.decoder.decoder import Decoder

PROMPT = [5, 9, 40, 5, 9, 77]


def uncompiled(graph, examples):
    return eager_compile(graph, "", examples)


@pytest.fixture(scope="module")
def splits():
    with torch.no_grad():
        return split_for_rows(tiny_model("llama"), 64, (1, 2), 16)[0]


@pytest.fixture(scope="module")
def in_bf16():
    with torch.no_grad():
        return split_for_rows(tiny_model("llama").bfloat16(), 64, (1, 2), 16)[0]


@pytest.fixture
def launched(kernels, monkeypatch):
    """The kernels that run from here on, by name, and with the names of their arguments."""
    from eepass.codegen.kernels import register

    run, seen = register.run, []

    def noted(made):
        seen.extend(made)
        run(made)

    monkeypatch.setattr(register, "run", noted)
    return seen


@pytest.mark.parametrize("spans", (True, False), ids=("spans", "masks"))
@pytest.mark.parametrize("rows", (1, 2, 16))
def test_captured_layers_of_few_rows_go_through_our_own_kernels(in_bf16, launched, rows, spans):
    compiler = CudaCompiler(uncompiled)
    decoder = Decoder(in_bf16, compiler, compiler.captured, spans)
    hidden = torch.randn(1, rows, 64).bfloat16()
    plain = decoder.run_layer(0, hidden, decoder.side_inputs.span(3, rows))
    assert launched == []
    found = decoder.run_layer(0, hidden, decoder.captured_span(rows, 3), captured=True)
    # queries, keys, values; attention; its output; gate and up; down
    names = [launch.name for launch in launched]
    assert names == [*["_rows_kernel"] * 3, "_attend_kernel", "_combine_kernel",
                     *["_rows_kernel"] * 4]  # fmt: skip
    given = launched[3].arguments
    assert (given["mask_ptr"] is None) == spans != (given["spans_ptr"] is None)
    torch.testing.assert_close(found, plain, atol=0.02 * float(plain.abs().max()), rtol=0)


def quantised(model):
    """``model`` with linear layers of 4 bits in groups of 32."""
    from eepass.checkpoints.quantized_weights import grouped, replace_linears

    weights = {}
    for name, linear in model.named_modules():
        if isinstance(linear, torch.nn.Linear):
            groups = linear.weight.float().unflatten(1, (-1, 32))
            least, most = groups.aminmax(dim=-1, keepdim=True)
            scale = (most - least) / 15
            codes = ((groups - least) / scale).round().to(torch.uint8).flatten(1)
            weights[name] = grouped(codes, scale[..., 0], least[..., 0], 4)
    replace_linears(model, weights)
    return model


@pytest.fixture(scope="module")
def in_int4():
    """Split; hidden states, and without kernels what layer 0 and the head make of them."""
    with torch.no_grad():
        model = quantised(tiny_model("llama").bfloat16())
        split = split_for_rows(model, 64, (1, 2), 16)[0]
        hidden, plain = torch.randn(1, 2, 64).bfloat16(), Decoder(split, eager_compile)
        layer = plain.run_layer(0, hidden, plain.side_inputs.span(3, 2))
        tensors = {**plain.tensors, "hidden": hidden}
        return split, hidden, layer, split[2].head.whole.run(lambda role: tensors[role.name])


def test_quantised_layers_go_through_a_kernel_of_their_own(in_int4, launched):
    (split, hidden, expected, (logits,)), compiler = in_int4, CudaCompiler(uncompiled)
    decoder = Decoder(split, compiler, compiler.captured, spans=True)
    found = decoder.run_layer(0, hidden, decoder.captured_span(2, 3), captured=True)
    names = [launch.name for launch in launched]
    assert names == [*["_packed_kernel"] * 3, "_attend_kernel", "_combine_kernel",
                     *["_packed_kernel"] * 4]  # fmt: skip
    torch.testing.assert_close(found, expected, atol=0.02 * float(expected.abs().max()), rtol=0)
    found = decoder.logits(hidden)
    assert launched[-1].name == "_packed_kernel"
    # not rounded on the way
    assert found.dtype == torch.float32 and not torch.equal(found, logits.float())
    torch.testing.assert_close(found, logits.float(), atol=0.02, rtol=0.01)


def test_captured_fills_go_through_the_row_kernel(in_bf16, launched):
    """Keys and values that policy ``propagate`` projects for the layers an exit skipped."""
    compiler, hidden = CudaCompiler(uncompiled), torch.randn(1, 1, 64).bfloat16()
    decoder = Decoder(in_bf16, compiler, compiler.captured, spans=True)
    place, cache = decoder.captured_span(1, 5), decoder.kv.keys[1]
    decoder.fill_kv(1, hidden, place)
    expected = cache.clone()
    assert launched == [] and expected.any()
    cache.zero_()
    decoder.fill_kv(1, hidden, place, captured=True)
    assert [launch.name for launch in launched] == ["_rows_kernel"] * 2
    torch.testing.assert_close(cache, expected, atol=0.02, rtol=0.02)


@pytest.fixture(scope="module")
def windows():
    """With full and sliding attention."""
    with torch.no_grad():
        return split_for_rows(tiny_model("gemma3").bfloat16(), 64, (1, 8), 16)[0]


@pytest.mark.parametrize("branches", (None, (4, 2, 1)), ids=("dense", "tree"))
def test_a_step_attends_by_spans_as_it_does_by_masks(windows, launched, branches, monkeypatch):
    """Its rows read no mask at all: not of a text, of a window, or of a tree."""
    from eepass.codegen import lower_cuda
    from eepass.runtime.step.launching import Launching, make_engine
    from eepass.runtime.step.layout import StepOptions
    from eepass.runtime.step.tree_shape import TreeShape

    # the interpreter takes its time over linear layers
    monkeypatch.setattr(lower_cuda, "LINEAR_ROWS", 0)
    tree = None if branches is None else TreeShape(branches)
    options = StepOptions(buckets=(1, 8), tree=tree)
    found = {}
    for spans in (False, True):
        compiler = CudaCompiler(uncompiled)
        decoder = Decoder(windows, compiler, compiler.captured, spans)
        launched.clear()
        engine, _ = make_engine(decoder, None, options, Launching("interpret", "to test"))
        found[spans] = [t.token for t in engine.generate(PROMPT * 2, 6)], decoder.kv
        attends = [x for x in launched if x.name == "_attend_kernel"]
        assert attends and all((x.arguments["mask_ptr"] is None) == spans for x in attends)
        sides = [engine.step[f"side {name}"] for name in decoder.side_inputs.masks]
        assert all((side.numel() == 3 * len(side)) == spans for side in sides)
    (tokens, kv), (expected, wanted) = found[True], found[False]
    assert tokens == expected
    # whose bits hang on all attention below
    assert torch.equal(kv.keys[-1], wanted.keys[-1]) and kv.keys[-1][0, :, 15].any()


def test_a_models_captured_layers_take_spans_where_its_compiler_does(splits):
    artifact = random_artifact(tiny_model("llama"))
    for compiler, expected in ((CudaCompiler(uncompiled), 1), (eager_compile, 0)):
        ready = EarlyExitModel(splits, PassReport(), frozenset(), artifact, compiler=compiler)
        assert len(ready.decoder.spans) == expected


def test_masks_of_what_the_kernel_does_not_multiply_are_made_of_spans(splits, kernels):
    """Attention in float32 stays as it is, with a mask that its layer makes."""
    compiler = CudaCompiler(uncompiled)
    decoder = Decoder(splits, compiler, compiler.captured, spans=True)
    hidden = torch.randn(1, 2, 64)
    expected = decoder.run_layer(0, hidden, decoder.side_inputs.span(3, 2))
    found = decoder.run_layer(0, hidden, decoder.captured_span(2, 3), captured=True)
    assert torch.equal(found, expected)


def test_captured_layers_in_float32_are_left_to_inductor(splits, kernels, monkeypatch):
    from eepass.codegen.kernels import register

    monkeypatch.setattr(register, "run", lambda *_: pytest.fail("a kernel ran"))
    compiler = CudaCompiler(uncompiled)
    decoder = Decoder(splits, compiler, compiler.captured)
    hidden, place = torch.randn(1, 2, 64), decoder.side_inputs.span(3, 2)
    expected = decoder.run_layer(0, hidden, place)
    assert torch.equal(decoder.run_layer(0, hidden, place, captured=True), expected)


def test_a_step_uses_what_is_compiled_for_captures(in_bf16):
    from steps import BUCKETS, engine_for

    used = []

    def captured(graph, structure, examples):
        used.append(len(examples))
        return eager_compile(graph, structure, examples)

    decoder = Decoder(in_bf16, eager_compile, captured)
    engine = engine_for(decoder, None, "host", buckets=BUCKETS[:2])
    assert len(list(engine.generate(PROMPT, 4))) == 4 and used
