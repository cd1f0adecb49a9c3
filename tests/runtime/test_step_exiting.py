"""The speculative step with exits: random trees and exits against plain lists, and what fails when
dead paths are not masked or deeper layers' keys and values stay unfilled."""

from inspect import signature

import pytest
import torch
from exits_in_trees import PlainPasses, Script, ScriptedTreeExits
from made_heads import bigrams, drafts_of
from models import eager_compile
from plain import PlainEngine
from steps import LateFlags, LateResultQueue

from eepass.errors import EngineError
from eepass.passes.pipeline import split_for_rows
from eepass.runtime.decoder.decoder import Decoder
from eepass.runtime.engine.engine import Engine
from eepass.runtime.sampling import Sampling
from eepass.runtime.step import exiting, text_drafts
from eepass.runtime.step.build_exiting import build_exiting_step
from eepass.runtime.step.build_speculative import build_speculative_step
from eepass.runtime.step.data import check_step
from eepass.runtime.step.exiting_engine import ExitingEngine
from eepass.runtime.step.host import Flags, HostDriven, called
from eepass.runtime.step.interpret import Interpreter
from eepass.runtime.step.layout import StepOptions
from eepass.runtime.step.speculative_engine import SpeculativeEngine
from eepass.runtime.step.tree_shape import TreeShape

DEPTH, LAYERS = 4, (1, 2, 3)
PROMPT, OTHER = [5, 9, 44, 7, 8], [61, 12, 90, 3, 3, 17, 101, 55, 4, 30, 31]
TREE = TreeShape((4, 2, 1))


@pytest.fixture(scope="module")
def decoder(llama):
    with torch.no_grad():
        return Decoder(split_for_rows(llama, 176, (1, 8), 8)[0], eager_compile)


@pytest.fixture(scope="module")
def plain(llama):
    return PlainEngine(llama)


def engine_over(
    decoder, exits=None, how="host", exact=False, stop=(), force=None, shape=TREE, head=None,
    pending=7, draws=False,
):  # fmt: skip
    options = StepOptions(
        force=force, stop=stop, tree=shape, pending=pending, draws=draws, exact=exact
    )
    step = build_exiting_step(decoder, exits, options, head=head)
    check_step(step)
    if exits is not None:
        exits.step = step
    if how in ("interpret", "predicated"):
        executor = Interpreter(step if how == "interpret" else step.flattened())
    else:
        flags = LateFlags(step.flags) if how == "late" else Flags()
        executor = HostDriven(step, flags, called(step))
    return ExitingEngine(decoder, step, executor, LateResultQueue(step["out"]), head=head)


def scripted(decoder, plain, monkeypatch, how="host", exact=False, stop=(), pending=7, **options):
    """An engine whose trees and exits are a script's, and the script."""
    script = Script(plain, TREE.rows - 1, **options)
    monkeypatch.setattr(text_drafts, "draft", script.draft)
    exits = ScriptedTreeExits(script, LAYERS, TREE.rows)
    return engine_over(decoder, exits, how, exact, stop, pending=pending), script


def expected_passes(engine, script, prompt, count, exact, stop=(), pending=7):
    """Tokens and their exit layers, of as many passes as there are, in plain lists."""
    found = [(script.plain.next_token(prompt), DEPTH)]
    limit = len(prompt) + count - 1
    passes = PlainPasses(script, [*prompt, found[0][0]], LAYERS, DEPTH, pending, exact, stop, limit)
    while len(found) < count and found[-1][0] not in stop:
        tokens, layer = passes.step()
        found += [(token, DEPTH if exact else layer) for token in tokens]
    return found, passes


def tokens_of(engine, prompt, count, **options):
    return [step.token for step in engine.generate(prompt, count, **options)]


@pytest.mark.parametrize("exact", (False, True))
@pytest.mark.parametrize("how", ("interpret", "predicated", "host", "late"))
def test_random_trees_and_exits_are_those_of_plain_lists(decoder, plain, monkeypatch, how, exact):
    engine, script = scripted(decoder, plain, monkeypatch, how, exact, seed=3)
    layers, rollbacks, count = set(), 0, 50 if how == "host" else 16
    # two sequences, one after the other
    for prompt in (PROMPT, OTHER):
        expected, passes = expected_passes(engine, script, prompt, count, exact)
        assert [tuple(step) for step in engine.generate(prompt, count)] == expected
        layers |= {layer for _, layer in expected}
        rollbacks += passes.rollbacks
    statistics = engine.statistics
    assert statistics.tokens == 2 * count - 2
    if exact:
        assert tokens_of(engine, PROMPT, count) == tokens_of(Engine(decoder), PROMPT, count)
        assert statistics.rollbacks >= rollbacks > 0
    else:
        assert layers == {1, 2, 3, DEPTH} or count < 50


@pytest.mark.parametrize("pending", (1, 7))
def test_300_tokens_are_those_of_plain_lists(decoder, plain, monkeypatch, pending):
    engine, script = scripted(decoder, plain, monkeypatch, seed=5, pending=pending)
    for prompt in (PROMPT, OTHER):
        expected, _ = expected_passes(engine, script, prompt, 151, False, pending=pending)
        assert [tuple(step) for step in engine.generate(prompt, 151)] == expected


@pytest.mark.parametrize("exact", (False, True))
def test_an_answer_ends_with_an_end_token_or_the_cache(decoder, plain, monkeypatch, exact):
    engine, script = scripted(decoder, plain, monkeypatch, exact=exact)
    expected, _ = expected_passes(engine, script, PROMPT, 40, exact)
    stop = expected[13][0], 159
    engine, script = scripted(decoder, plain, monkeypatch, exact=exact, stop=stop)
    expected, _ = expected_passes(engine, script, PROMPT, 40, exact, stop)
    found = [tuple(step) for step in engine.generate(PROMPT, 40)]
    assert found == expected and len(found) < 40
    for count in range(1, 9):
        expected, _ = expected_passes(engine, script, PROMPT, count, exact, stop)
        assert [tuple(step) for step in engine.generate(PROMPT, count)] == expected
    room = decoder.max_sequence_length
    long = OTHER * (room // len(OTHER))
    answer = engine.generate(long, 40)
    with pytest.raises(EngineError, match=f"the cache is full at {room} tokens"):
        list(answer)
    assert tokens_of(engine, PROMPT, 5) == [token for token, _ in expected[:5]]


@pytest.mark.parametrize("exact", (False, True))
def test_without_exits_the_tokens_are_those_of_the_exact_step(decoder, plain, exact):
    step = build_speculative_step(decoder, TREE, (), False)
    executor = HostDriven(step, Flags(), called(step))
    dense = SpeculativeEngine(decoder, step, executor, LateResultQueue(step["out"]))
    exits = ScriptedTreeExits(Script(plain, 7, often=0), LAYERS, TREE.rows)
    never = engine_over(decoder, exits, exact=exact)
    for prompt in (PROMPT, OTHER):
        assert tokens_of(never, prompt, 60) == tokens_of(dense, prompt, 60)
    assert never.statistics.passes == dense.statistics.passes
    assert never.statistics.predictors_run > 0


@pytest.mark.parametrize("layer", LAYERS)
def test_a_forced_exit_gives_the_heads_token_there(decoder, llama, layer):
    """The cut model's tokens over the dense cache."""
    ids, layers = list(OTHER), []
    for step in engine_over(decoder, force=layer).generate(OTHER, 30):
        states = llama(
            input_ids=torch.tensor([ids]), use_cache=False, output_hidden_states=True
        ).hidden_states
        state = states[step.exit_layer][:, -1:]
        # the last state comes normed
        z = state if step.exit_layer == DEPTH else llama.model.norm(state)
        assert step.token == int(llama.lm_head(z).argmax())
        ids.append(step.token)
        layers.append(step.exit_layer)
    assert set(layers) == {layer, DEPTH} and layers.count(layer) > 15


def test_exact_guesses_are_confirmed_together(decoder, plain, monkeypatch):
    """Where exits are mostly right, passes through all layers are few."""
    engine, _ = scripted(decoder, plain, monkeypatch, exact=True, right=1.0, often=1.0, least=2)
    assert tokens_of(engine, PROMPT, 60) == tokens_of(Engine(decoder), PROMPT, 60)
    found = engine.statistics
    full = found.full_heads / TREE.rows
    assert found.rollbacks == 0 and full < 12 and found.tokens == 59


def test_dead_paths_must_be_masked(decoder, plain, monkeypatch):
    """Switched off, a pass waits for rows that cannot be accepted, and seldom exits."""

    def early():
        engine, script = scripted(decoder, plain, monkeypatch, seed=5, often=0.4)
        found = [tuple(step) for step in engine.generate(OTHER, 100)]
        same = found == expected_passes(engine, script, OTHER, 100, False)[0]
        return same, sum(layer < DEPTH for _, layer in found)

    same, before = early()
    monkeypatch.setattr(exiting, "_live", lambda *tree: torch.ones_like(tree[-1]))
    different, after = early()
    assert same and not different and after < before / 2


def has_dense_cache(decoder, engine):
    """Whether keys and values in all layers are those of a prompt, up to the pending tokens."""
    answer = engine.generate(PROMPT, 60)
    for _ in range(50):
        next(answer)
    count = int(engine.step["position"]) - int(engine.step["pending"])
    ours = [cache[:, :, :count].clone() for cache in (*decoder.kv.keys, *decoder.kv.values)]
    answer.close()
    ids = engine.step["history"][:count].tolist()
    Engine(decoder).prefill(ids, lambda layer, hidden: None)
    dense = [cache[:, :, :count] for cache in (*decoder.kv.keys, *decoder.kv.values)]
    assert count > len(PROMPT) + 40
    return all(torch.allclose(a, b, atol=2e-5) for a, b in zip(ours, dense, strict=True))


def test_deeper_layers_must_have_keys_and_values_of_tokens_that_exited(decoder, plain, monkeypatch):
    """Forgetting that tokens are pending leaves them unfilled."""
    engine, _ = scripted(decoder, plain, monkeypatch, seed=5)
    assert has_dense_cache(decoder, engine)
    settle = exiting.settle

    def forgetful(*buffers, **options):
        settle(*buffers, **options)
        names = list(signature(settle).parameters)
        buffers[names.index("pending")].zero_()

    monkeypatch.setattr(exiting, "settle", forgetful)
    engine, _ = scripted(decoder, plain, monkeypatch, seed=5)
    assert not has_dense_cache(decoder, engine)


def test_other_ways_to_fill_the_cache_are_refused(decoder):
    with pytest.raises(ValueError, match="kv='drop': must be defer"):
        build_exiting_step(decoder, None, StepOptions(force=2, tree=TREE, kv="drop"))


@pytest.mark.parametrize("exact", (False, True))
def test_teacher_forcing_follows_the_answer(decoder, plain, exact):
    answer = [plain.next_token(OTHER), 40, 41, *tokens_of(Engine(decoder), OTHER, 12)]
    engine = engine_over(decoder, force=2, exact=exact, stop=(41,))
    found = engine.follow(OTHER, answer)
    assert len(found) == len(answer) - 1
    for index, step in enumerate(found):
        text = [*OTHER, *answer[: index + 1]]
        if step.exit_layer == DEPTH:
            assert step.token == plain.next_token(text)
    layers = [step.exit_layer for step in found]
    assert layers == [DEPTH] * 14 if exact else layers == [*[2] * 7, DEPTH, *[2] * 6]


def test_sampled_exact_tokens_are_those_without_exits(decoder):
    step = build_speculative_step(decoder, TREE, (), True)
    executor = HostDriven(step, Flags(), called(step))
    plainly = SpeculativeEngine(decoder, step, executor, LateResultQueue(step["out"]))
    engine = engine_over(decoder, force=3, exact=True, draws=True)
    for seed in range(3):
        sampling = Sampling(temperature=0.4, top_p=0.9, seed=seed)
        found = tokens_of(engine, OTHER, 40, sampling=sampling)
        assert found == tokens_of(plainly, OTHER, 40, sampling=sampling)
    assert engine.statistics.exit_layers[DEPTH] == 117


@pytest.mark.parametrize("how", ("interpret", "late"))
@pytest.mark.parametrize("exact", (False, True))
def test_a_draft_heads_tree_goes_with_exits(decoder, llama, exact, how):
    """It drafts again after each pass through all layers, from what that has confirmed."""
    dense = tokens_of(Engine(decoder), PROMPT, 60)
    shape = TreeShape((2,), named=5, levels=3)
    head = drafts_of(decoder, bigrams([dense]))
    engine = engine_over(decoder, force=3, exact=exact, how=how, shape=shape, head=head, pending=3)
    found = list(engine.generate(PROMPT, 60))
    ids = list(PROMPT)
    for step in found:
        states = llama(
            input_ids=torch.tensor([ids]), use_cache=False, output_hidden_states=True
        ).hidden_states
        state = states[step.exit_layer][:, -1:]
        z = state if step.exit_layer == DEPTH else llama.model.norm(state)
        assert step.token == int(llama.lm_head(z).argmax())
        ids.append(step.token)
    assert not exact or [step.token for step in found] == dense
    assert engine.statistics.tokens == 59
