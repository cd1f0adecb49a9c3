"""Steps in flight, what is dropped after an end token, faults, memory, and late flags."""

import gc
import weakref

import pytest
import torch
from models import eager_compile
from plain import PlainEngine
from steps import LateFlags, OrderedExits, engine_for, names

from eepass.errors import EngineError
from eepass.runtime.decoder.decoder import Decoder
from eepass.runtime.step.build import build_step
from eepass.runtime.step.data import StepError
from eepass.runtime.step.host import HostDriven, called
from eepass.runtime.step.layout import StepOptions

PROMPT = [5, 9, 44, 7, 8]
DEPTH = 4


@pytest.fixture(scope="module")
def decoder(llama_splits):
    return Decoder(llama_splits, eager_compile)


@pytest.fixture(scope="module")
def dense(llama):
    return PlainEngine(llama).answer(PROMPT, 30)


@pytest.mark.parametrize("in_flight", (1, 2, 5))
def test_what_follows_a_stop_token_is_dropped(decoder, dense, in_flight):
    stop = dense[6]
    engine = engine_for(decoder, None, "host", stop=(stop, 159), in_flight=in_flight)
    tokens = [step.token for step in engine.generate(PROMPT, 30)]
    assert tokens == dense[: dense.index(stop) + 1]
    # the steps in flight when it came, and one that caught up
    assert engine.steps == len(tokens) - 1 + in_flight - 1 + 1
    assert engine.results.most == in_flight
    # surplus steps are not counted
    assert engine.statistics.tokens == len(tokens) - 1
    assert int(engine.step["position"]) == len(PROMPT) + len(tokens) - 1
    # and do not change the next answer
    assert [step.token for step in engine.generate(PROMPT, 30)] == tokens


def test_surplus_steps_catch_up_and_do_no_more(decoder):
    """A stop token exits early: the step after it catches up the pending tokens."""
    exits = OrderedExits((1, 2), [{1}] * 9, [20, 21, 22, 158, 24, 25, 26, 27, 28], [1] * 9)
    engine = engine_for(decoder, exits, "interpret", stop=(158,), in_flight=3)
    tokens = [tuple(step) for step in engine.generate(PROMPT, 9)]
    assert tokens[1:] == [(20, 1), (21, 1), (22, 1), (158, 1)]
    assert engine.step["depth"].tolist() == [DEPTH] * 8
    assert engine.statistics.exit_layers == [0, 4, 0, 0, 0]
    assert engine.statistics.rows_caught_up == 4
    engine._launch()
    assert "layers 2–4, 1 row" not in engine.executor.ran


def test_an_answer_of_one_token_launches_nothing_but_the_end(decoder, dense):
    engine = engine_for(decoder, None, "host")
    assert [step.token for step in engine.generate(PROMPT, 1)] == dense[:1]
    assert engine.steps == 1
    assert list(engine.generate(PROMPT, 0)) == []


def test_a_stream_that_is_closed_leaves_the_engine_ready(decoder, dense):
    engine = engine_for(decoder, None, "host", in_flight=3)
    stream = engine.generate(PROMPT, 30)
    assert [next(stream).token for _ in range(5)] == dense[:5]
    with pytest.raises(EngineError, match="another sequence"):
        next(engine.generate(PROMPT, 30))
    stream.close()
    assert [step.token for step in engine.generate(PROMPT, 30)] == dense


@pytest.mark.parametrize("ids, message", (([], "empty"), (list(range(3, 150)), "room for 112")))
def test_prompts_that_do_not_fit(decoder, ids, message):
    with pytest.raises(EngineError, match=message):
        next(engine_for(decoder, None, "host").generate(ids, 4))


def test_a_full_cache_is_an_error_after_the_tokens_that_fit(decoder):
    engine, tokens = engine_for(decoder, None, "host"), []
    with pytest.raises(EngineError, match=r"full at 112 tokens: .*raise max_length"):
        for step in engine.generate(list(range(3, 113)), 10):
            tokens.append(step)
    assert len(tokens) == 3


@pytest.mark.parametrize("how", ("interpret", "host"))
def test_a_fault_is_named_and_a_new_engine_works(decoder, dense, how):
    class Failing:
        synchronisations = 0

        def step(self):
            raise RuntimeError("CUDA error: unspecified launch failure\nand so on")

        def close(self):
            pass

    engine = engine_for(decoder, None, how)
    engine.executor = Failing()
    with pytest.raises(EngineError, match=r"failed while decoding \(CUDA error.*failure\)"):
        list(engine.generate(PROMPT, 5))
    engine.close()
    assert [s.token for s in engine_for(decoder, None, how).generate(PROMPT, 30)] == dense


def test_logits_that_are_not_finite_are_refused(decoder):
    engine = engine_for(decoder, None, "host")
    stream = engine.generate(PROMPT, 10)
    next(stream)
    engine.step["hidden"].fill_(torch.nan)
    weight = decoder.tensors["model.norm.weight"]
    kept = weight.clone()
    try:
        weight.fill_(torch.nan)
        with pytest.raises(EngineError, match="not finite"):
            list(stream)
    finally:
        weight.copy_(kept)


def test_memory_goes_with_the_engine(decoder):
    engine = engine_for(decoder, OrderedExits((1, 2), [], [1], [1]), "host")
    held = [weakref.ref(b.tensor) for b in engine.step.wholes if b.owner == "step"]
    assert engine.step.nbytes < 3e5
    engine.close()
    del engine
    gc.collect()
    assert not any(ref() is not None for ref in held)


def test_every_launch_of_a_real_step_is_as_declared(decoder):
    exits = OrderedExits((1, 2, 4), [{1}, {2}, set(), {4}, {1, 2}], [20] * 5, [1, 1, 1, 1, 2])
    for kv in ("defer", "propagate", "drop"):
        exits.turn = -1
        engine = engine_for(decoder, exits, "interpret", watch=True, kv=kv)
        layers = [step.exit_layer for step in engine.generate(PROMPT, 6)]
        assert layers == [4, 1, 2, 4, 4, 2]


def test_an_undeclared_write_of_a_real_step_is_found(decoder):
    engine = engine_for(decoder, None, "interpret", watch=True)
    step = engine.step
    (layers,) = [item for item in step.items if getattr(item, "name", "").startswith("layers")]
    object.__setattr__(layers, "writes", tuple(n for n in layers.writes if n != "keys.2"))
    with pytest.raises(StepError, match=r"writes keys\.2, which it does not declare"):
        list(engine.generate(PROMPT, 3))


def late(decoder, exits, **options):
    step = build_step(decoder, exits, StepOptions(**options))
    flags, ran = LateFlags(step.flags), []

    def prepare(block):
        run = called(step)(block)
        return lambda: (ran.extend(launch.name for launch in block), run())

    return step, HostDriven(step, flags, prepare), flags, ran


def test_late_flags_are_waited_for_while_segments_run(decoder):
    """One wait a step and one for each active exit; a segment that should not have run is launched
    once and changes nothing."""
    exits = OrderedExits((1, 2), [{1}, set()], [20, 20], [1, 1])
    step, executor, flags, ran = late(decoder, exits, verify="always")
    engine = engine_for(decoder, None, "host")
    for name in ("token", "position", "depth", "ring"):
        step[name].copy_(engine.step[name])
    executor.step()
    assert step["out"].tolist() == [20, 1]
    assert ran[-2:] == ["layers 1–2, 1 row", "commit"]
    assert "verify 1" in ran and "predict 2" not in ran
    assert flags.synchronisations == 2
    ran.clear()
    executor.step()
    # the pending token runs too, in a segment of two rows
    assert [name for name in ran if name.startswith("layers")] == [
        "layers 0–1, 1 row", "layers 1–2, 2 rows", "layers 2–4, 2 rows",
    ]  # fmt: skip
    assert flags.synchronisations == 5


def test_a_step_is_a_short_list(decoder):
    step = build_step(
        decoder, OrderedExits((1, 2), [], [1], [1]), StepOptions(buckets=(1, 2, 4, 8))
    )
    assert len(names(step)) == len(set(names(step)))
    assert names(step)[:6] == ["begin", "embed", "sides", "layers 0–1, 1 row", "draft", "predict 1"]
    assert names(step)[-2:] == ["head", "commit"]
