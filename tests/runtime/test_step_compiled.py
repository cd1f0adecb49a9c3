"""A step whose layers and updates are compiled as for a GPU, on the CPU."""

import pytest
import torch
from exits_in_trees import Script, ScriptedTreeExits
from models import eager_compile
from plain import PlainEngine
from steps import BUCKETS, LateResultQueue, OrderedExits, engine_for

from eepass.runtime.decoder.decoder import Decoder
from eepass.runtime.sampling import Sampling
from eepass.runtime.step.build import build_step
from eepass.runtime.step.build_exiting import build_exiting_step
from eepass.runtime.step.build_speculative import build_speculative_step
from eepass.runtime.step.engine import StepEngine
from eepass.runtime.step.exiting_engine import ExitingEngine
from eepass.runtime.step.interpret import Interpreter
from eepass.runtime.step.layout import StepOptions
from eepass.runtime.step.speculative_engine import SpeculativeEngine
from eepass.runtime.step.tree_shape import TreeShape

PROMPT = [5, 9, 44, 7, 8]


def exits():
    wanted = [{1}, {2}, set(), {1}, {1, 2}, {2}, set(), {1}] * 3
    return OrderedExits((1, 2), wanted, list(range(20, 44)), [1, 1, 1, 2] * 6)


@pytest.mark.slow
@pytest.mark.parametrize("kv", ("defer", "propagate"))
def test_compiled_steps_are_the_eager_ones(llama_splits, kv):
    from eepass.codegen.lower_cuda import CudaCompiler

    compiler = CudaCompiler()
    decoder = Decoder(llama_splits, compiler)
    step = build_step(decoder, exits(), StepOptions(kv=kv, buckets=BUCKETS), compiler.fuse)
    results = LateResultQueue(step["out"])
    engine = StepEngine(decoder, step, Interpreter(step), results, prompt_rows=16)
    found = [tuple(token) for token in engine.generate(PROMPT, 25)]
    other = engine_for(Decoder(llama_splits, eager_compile), exits(), kv=kv)
    assert found == [tuple(token) for token in other.generate(PROMPT, 25)]
    assert engine.step["counters"].tolist() == other.step["counters"].tolist()
    for ours, theirs in zip(decoder.kv.keys, other.decoder.kv.keys, strict=True):
        assert torch.allclose(ours[:, :, :29], theirs[:, :, :29], atol=2e-5)


@pytest.mark.slow
def test_a_compiled_speculative_step_is_the_eager_one(llama_splits):
    from eepass.codegen.lower_cuda import CudaCompiler

    compiler, found = CudaCompiler(), []
    for decoder, fuse in (
        (Decoder(llama_splits, compiler, compiler.captured), compiler.fuse),
        (Decoder(llama_splits, eager_compile), None),
    ):
        step = build_speculative_step(decoder, TreeShape((4, 2, 1)), (), True, fuse)
        engine = SpeculativeEngine(decoder, step, Interpreter(step), LateResultQueue(step["out"]))
        greedy = [tuple(token) for token in engine.generate(PROMPT, 50)]
        drawn = engine.generate(PROMPT, 50, Sampling(temperature=0.7, top_k=20, seed=5))
        found.append((greedy, [tuple(token) for token in drawn], step["counters"].tolist()))
    assert found[0] == found[1]


@pytest.mark.slow
@pytest.mark.parametrize("exact", (False, True))
def test_a_compiled_step_with_exits_in_a_tree_is_the_eager_one(llama, llama_splits, exact):
    from eepass.codegen.lower_cuda import CudaCompiler

    compiler, found, script = CudaCompiler(), [], Script(PlainEngine(llama), 7)
    options = StepOptions(tree=TreeShape((4, 2, 1)), exact=exact)
    for decoder, fuse in (
        (Decoder(llama_splits, compiler, compiler.captured), compiler.fuse),
        (Decoder(llama_splits, eager_compile), None),
    ):
        scripted = ScriptedTreeExits(script, (1, 2), 8)
        scripted.step = step = build_exiting_step(decoder, scripted, options, fuse)
        engine = ExitingEngine(decoder, step, Interpreter(step), LateResultQueue(step["out"]))
        tokens = [tuple(token) for token in engine.generate(PROMPT, 30)]
        found.append((tokens, step["counters"].tolist()))
    assert found[0] == found[1]
