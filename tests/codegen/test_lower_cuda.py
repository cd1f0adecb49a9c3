"""Segments lowered for a GPU, on the CPU: the same path, the kernels in Triton's interpreter."""

from dataclasses import replace

import pytest
import torch
from models import eager_compile, random_artifact, tiny_model
from torch.fx.experimental.proxy_tensor import make_fx

from eepass.codegen.lower_cuda import CudaCompiler, is_fused
from eepass.config import ExitConfig
from eepass.model import EarlyExitModel
from eepass.passes.exits.fuse_exit_predictor import fuse_exit_predictor
from eepass.passes.exits.insert_predictors import insert_predictors
from eepass.passes.pipeline import split_for_rows
from eepass.passes.report import PassReport
from eepass.planning import exit_tensors, make_plan
from eepass.runtime.sampling import Sampling

APPROXIMATE = ExitConfig(speculate="off").approximate(0.98)
PROMPT = [5, 9, 40, 5, 9, 77]


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def splits(model):
    with torch.no_grad():
        return split_for_rows(model, 64, (1, 2), 16)[0]


@pytest.fixture(scope="module")
def artifact(model):
    return random_artifact(model)


def uncompiled(graph, examples):
    return eager_compile(graph, "", examples)


def fused_segments(split, plan, tensors, report, rows=1):
    """``insert_predictors``' segments, each predictor one kernel where it can be."""
    segments = insert_predictors(split, plan, tensors, PassReport(), rows)
    fused = fuse_exit_predictor(split, plan, tensors, report, rows)
    return segments if fused is None else replace(segments, predictors=fused.predictors)


def early_exits(splits, artifact, compiler, segments):
    ready = EarlyExitModel(
        splits, PassReport(), frozenset(), artifact, compiler=compiler, segments_for=segments
    )
    ready.configure(APPROXIMATE)
    return ready


def generate(ready):
    return [
        (step.token, step.exit_layer)
        for step in ready.engine.generate(PROMPT, 12, frozenset(), Sampling())
    ]


def test_a_model_exits_where_the_uncompiled_one_does(splits, artifact, kernels, monkeypatch):
    report, seen = PassReport(), []

    def segments(config, plan, tensors, rows):
        return fused_segments(splits[1], plan, tensors, report, rows)

    compiler = CudaCompiler(uncompiled)
    ready = early_exits(splits, artifact, compiler, segments)
    from eepass.codegen.kernels import register

    run = register.run

    def noted(made):
        seen.extend(launch.name for launch in made)
        run(made)

    monkeypatch.setattr(register, "run", noted)
    found = generate(ready)
    register.unregister_kernels("CPU")
    plain = early_exits(splits, artifact, eager_compile, None)
    expected = generate(plain)
    assert found == expected
    assert {layers for _, layers in found} > {4}, "no token exited early"
    assert {"_gate_kernel", "_exit_kernel", "_verify_kernel"} <= set(seen)
    assert not report.skipped and report.rewritten
    assert len(compiler.report["fused"]) >= 2 and not compiler.report["as traced"]


def test_fused_segments_decide_verify_and_draft_as_the_eager_ones(splits, artifact, kernels):
    split, plan = splits[1], make_plan(APPROXIMATE, artifact, 4)
    tensors = exit_tensors("default", artifact, split.tensors, split)
    tensors = {**split.tensors, **tensors, **plan.threshold_tensors()}
    fused = fuse_exit_predictor(split, plan, tensors, PassReport(), 3)
    compiler, decided = CudaCompiler(), []
    torch.manual_seed(0)

    def both(segment, *given):
        values = iter(given)
        inputs = [
            tensors[r.name] if r.kind == "parameter" else next(values) for r in segment.inputs
        ]
        with torch.no_grad():
            found = compiler(segment.graph, segment.structure, inputs)(list(inputs))
            from eepass.codegen.kernels.register import register_kernels, unregister_kernels

            unregister_kernels("CPU")
            expected = segment.graph(*inputs)
            register_kernels(key="CPU")
        return found, expected

    for _ in range(4):
        hidden = torch.randn(1, 3, split.hidden_size) * 3
        drafts, previous = torch.randint(160, (3, 16)), torch.rand(3, 16).softmax(-1)
        for point in plan.exits:
            found, expected = both(fused.predictors[point.layer], hidden, drafts, previous)
            assert torch.equal(found[3], expected[3])
            torch.testing.assert_close(found[0], expected[0], atol=1e-5, rtol=1e-5)
            decided += found[3].tolist()
        for segment in (fused.verify, fused.final):
            found, expected = both(segment, hidden, drafts)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        found, expected = both(fused.draft, hidden)
        assert torch.equal(found[1], expected[1])
    assert any(decided) and not all(decided)
    assert len(compiler.report["fused"]) == len(compiler.compiled)


def test_logits_come_out_of_the_kernel_in_float32(kernels):
    torch.manual_seed(0)
    inputs = [torch.randn(1, 2, 64).bfloat16(), torch.randn(160, 64).bfloat16() / 8]
    graph = make_fx(torch.nn.functional.linear, pre_dispatch=True)(*inputs)
    (logits,) = CudaCompiler(uncompiled)(graph, "", inputs, logits=True)(inputs)
    plain = graph(*inputs)
    assert plain.dtype == torch.bfloat16 and logits.dtype == torch.float32
    assert logits.shape == plain.shape
    torch.testing.assert_close(logits, inputs[0].float() @ inputs[1].float().T)
    # not rounded on the way
    assert not torch.equal(logits, plain.float())


def test_many_rows_stay_a_matrix_product_and_the_report_says_so(splits):
    from eepass.codegen import lower_cuda

    head, compiler = splits[16].head.whole, CudaCompiler(uncompiled)
    inputs = [
        torch.randn(1, 16, 64) if r.kind == "hidden" else splits[16].tensors[r.name].detach()
        for r in head.inputs
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lower_cuda, "MOST_ROWS", 8)
        (logits,) = compiler(head.graph, head.structure, inputs, logits=True)(inputs)
    expected = head.graph(*inputs)
    expected = expected[0] if isinstance(expected, tuple) else expected
    assert torch.equal(logits, expected)
    (left,) = compiler.report["as traced"]
    assert "16 rows are a matrix product" in left


def test_what_inductor_cannot_do_runs_as_traced_with_its_reason(splits):
    from torch._inductor.exc import InductorError

    def refuse(graph, examples):
        raise InductorError(NotImplementedError("no such lowering"), None)

    compiler, head = CudaCompiler(refuse), splits[1].head.norm
    inputs = [
        torch.randn(1, 1, 64) if r.kind == "hidden" else splits[1].tensors[r.name].detach()
        for r in head.inputs
    ]
    (found,) = compiler(head.graph, head.structure, inputs)(inputs)
    expected = head.graph(*inputs)
    assert torch.equal(found, expected[0] if isinstance(expected, tuple) else expected)
    (reason,) = compiler.report["as traced"]
    assert "NotImplementedError: no such lowering" in reason
    assert compiler.report["inductor"] == []


def test_a_segment_goes_through_inductor(splits):
    """The inner compiler for real, on one small segment."""
    compiler, head = CudaCompiler(), splits[1].head.norm
    inputs = [
        torch.randn(1, 1, 64) if r.kind == "hidden" else splits[1].tensors[r.name].detach()
        for r in head.inputs
    ]
    (found,) = compiler(head.graph, head.structure, inputs)(list(inputs))
    expected = head.graph(*inputs)
    expected = expected[0] if isinstance(expected, tuple) else expected
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    assert len(compiler.report["inductor"]) == 1
    assert not is_fused(head.graph)


def tuned(monkeypatch, graph, inputs, process_tunes):
    """Whether inductor tunes the kernels of ``graph`` in a process that tunes all or none."""
    from torch._inductor import config

    from eepass.codegen import lower_cuda

    seen = []

    def inductor(ready, fakes):
        seen.append(config.coordinate_descent_tuning)
        return uncompiled(ready, fakes)

    monkeypatch.setattr(lower_cuda, "through_inductor", inductor)
    with config.patch(coordinate_descent_tuning=process_tunes):
        CudaCompiler()(graph, "", inputs)
    return seen == [True]


@pytest.mark.parametrize("process_tunes", [False, True])
def test_only_products_of_one_row_are_tuned(splits, monkeypatch, process_tunes):
    """Tuning runs each kernel of a graph dozens of times: minutes, for a prompt's rows."""

    def layer(rows):
        found = splits[rows].layers[0]
        inputs = [
            splits[rows].tensors[role.name].detach()
            if role.kind == "parameter"
            else torch.zeros(like.shape, dtype=like.dtype)
            for role, like in found.examples.items()
        ]
        return found.graph, inputs

    assert [tuned(monkeypatch, *layer(rows), process_tunes) for rows in (1, 2, 16)] == [
        True,
        False,
        False,
    ]
    row = torch.randn(1, 1, 64)
    no_product = make_fx(lambda x: x / x.norm(), pre_dispatch=True)(row)
    assert not tuned(monkeypatch, no_product, [row], process_tunes)


def test_an_update_is_compiled_once_for_all_steps_with_such_tensors():
    from functools import partial

    def add(target, other, *, times):
        target.add_(other, alpha=times)

    made = []

    def counting(graph, examples):
        made.append(len(examples))
        return uncompiled(graph, examples)

    compiler, sums = CudaCompiler(counting), []
    for times, size in ((2, 3), (2, 3), (3, 3), (2, 4)):
        target = torch.zeros(size)
        compiler.fuse(partial(add, times=times))(target, torch.ones(size))
        sums.append(target.tolist())
    assert sums == [[2.0] * 3, [2.0] * 3, [3.0] * 3, [2.0] * 4]
    assert len(made) == 3
