"""The speculative step: draft tokens and accept walk against plain lists, answers against the exact
engine, token for token."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import eager_compile, tiny_model
from steps import BUCKETS, LateFlags, LateResultQueue

from eepass.errors import EngineError
from eepass.passes.pipeline import split_for_rows
from eepass.runtime.decoder.decoder import Decoder
from eepass.runtime.engine.engine import Engine
from eepass.runtime.sampling import Sampling
from eepass.runtime.step import speculating
from eepass.runtime.step.build_speculative import build_speculative_step
from eepass.runtime.step.data import check_step
from eepass.runtime.step.host import Flags, HostDriven, called
from eepass.runtime.step.interpret import Interpreter
from eepass.runtime.step.speculative_engine import SpeculativeEngine

SIZE = 40
PROMPTS = ([5, 9, 44, 7, 8], [61, 12, 90, 3, 3, 17, 101, 55, 4, 30, 31], [7, 8] * 6, [3])


@pytest.fixture(scope="module")
def decoder(llama_splits):
    return Decoder(llama_splits, eager_compile)


def plain_draft(text, count):
    """What followed the latest of the likest earlier places, by comparing lists."""
    last, best, place = len(text) - 1, 0, None
    for at in range(last):
        length = 0
        while length < speculating.COMPARED and length <= at:
            if text[at - length] != text[last - length]:
                break
            length += 1
        if length and length >= best:
            best, place = length, at
    if place is None:
        return None
    period = text[place + 1 :]
    return [period[index % len(period)] for index in range(count)]


@settings(max_examples=200, deadline=None)
@given(text=st.lists(st.integers(0, 3), min_size=1, max_size=20), rows=st.sampled_from([2, 4, 8]))
def test_draft_tokens_are_those_of_plain_lists(text, rows):
    history = torch.full((SIZE,), 9)
    # what lies behind the last token is of another text
    history[len(text) :] = torch.arange(SIZE - len(text)) % 4
    history[: len(text)] = torch.tensor(text)
    ids, positions, slots = (torch.zeros(rows, dtype=torch.long) for _ in range(3))
    known, position = torch.zeros(1, dtype=torch.bool), torch.tensor([len(text) - 1])
    speculating.draft(history, position, torch.tensor([18]), ids, positions, slots, known)
    expected = plain_draft(text, rows - 1)
    assert known.item() == (expected is not None) and ids[0] == text[-1]
    assert expected is None or ids[1:].tolist() == expected
    assert slots.tolist() == list(range(len(text) - 1, len(text) - 1 + rows))
    assert positions.tolist() == [min(slot, 18) for slot in slots.tolist()]


def plain_accept(ids, known, tokens, finite, stop, room, stopped):
    """The tokens that are kept, and whether the sequence has ended."""
    kept = []
    for index, token in enumerate(tokens):
        if stopped or index == room:
            break
        kept.append(token if finite[index] else -1)
        if token in stop or not finite[index]:
            stopped = True
        elif index + 1 == len(ids) or not known or token != ids[index + 1]:
            break
    return kept, stopped or len(kept) >= room


@settings(max_examples=300, deadline=None)
@given(data=st.data(), known=st.booleans(), stopped=st.booleans(), room=st.integers(1, 9))
def test_the_accept_walk_is_that_of_plain_lists(data, known, stopped, room):
    rows = data.draw(st.sampled_from([2, 4, 8]))
    some = st.lists(st.integers(3, 5), min_size=rows, max_size=rows)
    ids, tokens = data.draw(some), data.draw(some)
    finite = data.draw(
        st.lists(st.sampled_from([True] * 5 + [False]), min_size=rows, max_size=rows)
    )
    history, position = torch.zeros(SIZE, dtype=torch.long), torch.tensor([10])
    flag, out = torch.tensor([stopped]), torch.zeros(rows + 1, dtype=torch.long)
    counters = torch.zeros(len(speculating.COUNTED), dtype=torch.long)
    best = torch.tensor([0.0 if good else torch.inf for good in finite])
    speculating.accept(
        torch.tensor(ids), torch.tensor([known]), torch.tensor(tokens), best,
        torch.tensor([5, -2]), torch.tensor([10 + room]), history, position, flag, counters, out,
    )  # fmt: skip
    kept, ended = plain_accept(ids, known, tokens, finite, {5}, room, stopped)
    assert out.tolist() == [len(kept), *kept, *[-2] * (rows - len(kept))]
    assert position.item() == 10 + len(kept) and flag.item() == ended
    written = [tokens[index] for index in range(len(kept))]
    assert history.tolist() == [*[0] * 11, *written, *[0] * (SIZE - 11 - len(kept))]
    assert counters.tolist() == [int(not stopped), len(kept)]


def engine_over(decoder, how="host", rows=8, stop=(), draws=False, in_flight=2):
    step = build_speculative_step(decoder, rows, stop, draws)
    check_step(step)
    if how == "interpret":
        executor = Interpreter(step)
    else:
        flags = LateFlags(step.flags) if how == "late" else Flags()
        executor = HostDriven(step, flags, called(step))
    return SpeculativeEngine(decoder, step, executor, LateResultQueue(step["out"]), in_flight)


def tokens_of(engine, prompt, count, **options):
    return [step.token for step in engine.generate(prompt, count, **options)]


@pytest.mark.parametrize("how", ("interpret", "host", "late"))
@pytest.mark.parametrize("rows", (1, 4, 8))
def test_answers_are_those_of_the_exact_engine_in_fewer_passes(decoder, how, rows):
    engine, passes, tokens = engine_over(decoder, how, rows), 0, 0
    for prompt in PROMPTS:
        count = 100 - len(prompt)
        expected = tokens_of(Engine(decoder), prompt, count)
        assert tokens_of(engine, prompt, count) == expected
        found = engine.statistics
        passes, tokens = found.passes, found.tokens
    assert tokens > 300 and engine.executor.synchronisations == 0
    # the tiny model falls into repetition, which its text foretells
    assert passes < tokens / 2 if rows > 1 else passes >= tokens


@pytest.mark.parametrize("in_flight", (1, 2, 4))
def test_the_host_may_be_any_number_of_passes_behind(decoder, in_flight):
    engine = engine_over(decoder, "host", in_flight=in_flight)
    assert tokens_of(engine, PROMPTS[0], 60) == tokens_of(Engine(decoder), PROMPTS[0], 60)
    assert engine.results.most == in_flight


def test_an_answer_ends_with_an_end_token_or_the_cache(decoder):
    expected = tokens_of(Engine(decoder), PROMPTS[0], 60)
    stop = expected[17]
    engine = engine_over(decoder, stop=(stop, 159))
    wanted = expected[: expected.index(stop) + 1]
    assert tokens_of(engine, PROMPTS[0], 60) == wanted
    assert tokens_of(engine, PROMPTS[0], 5) == wanted[:5]
    room, engine = decoder.max_sequence_length, engine_over(decoder)
    long = PROMPTS[1] * (room // len(PROMPTS[1]))
    answer = engine.generate(long, 40)
    found = [next(answer).token for _ in range(room - len(long) + 1)]
    with pytest.raises(EngineError, match=f"the cache is full at {room} tokens"):
        next(answer)
    assert found == tokens_of(Engine(decoder), long, len(found))
    # and the next one is served
    assert tokens_of(engine, PROMPTS[2], 30) == tokens_of(Engine(decoder), PROMPTS[2], 30)


def test_keys_and_values_are_the_dense_ones(decoder):
    engine = engine_over(decoder)
    ids = [*PROMPTS[1], *tokens_of(engine, PROMPTS[1], 60)][:-1]
    ours = [cache[:, :, : len(ids)].clone() for cache in (*decoder.kv.keys, *decoder.kv.values)]
    Engine(decoder).prefill(ids, lambda layer, hidden: None)
    for found, cache in zip(ours, (*decoder.kv.keys, *decoder.kv.values), strict=True):
        assert torch.allclose(found, cache[:, :, : len(ids)], atol=2e-5)


def test_sampled_tokens_are_those_of_one_row_a_pass(decoder):
    """A token hangs on seed and position, whatever was drafted."""
    one, eight = (engine_over(decoder, rows=rows, draws=True) for rows in (1, 8))
    answers = set()
    for seed in range(4):
        sampling = Sampling(temperature=0.4, top_p=0.9, seed=seed)
        found = tokens_of(eight, PROMPTS[2], 40, sampling=sampling)
        assert found == tokens_of(one, PROMPTS[2], 40, sampling=sampling)
        answers.add(tuple(found))
    assert len(answers) > 1
    assert eight.statistics.passes < one.statistics.passes
    # greedily again
    assert tokens_of(eight, PROMPTS[0], 30) == tokens_of(Engine(decoder), PROMPTS[0], 30)


def test_teacher_forcing_gives_what_follows_each_token(decoder):
    engine, answer = engine_over(decoder), tokens_of(Engine(decoder), PROMPTS[1], 20)
    assert [t.token for t in engine.follow(PROMPTS[1], answer)] == answer[1:]
    other = [answer[0], 77, 78, *answer[3:]]
    for index, found in enumerate(engine.follow(PROMPTS[1], other)):
        text = [*PROMPTS[1], *other[: index + 1]]
        assert [found.token] == tokens_of(Engine(decoder), text, 1)


@pytest.mark.parametrize("family", ("gemma3", "gpt2"))
def test_windows_and_learned_positions(family):
    decoder = Decoder(split_for_rows(tiny_model(family), 128, BUCKETS, 16)[0], eager_compile)
    engine = engine_over(decoder)
    for prompt in PROMPTS[:3]:
        assert tokens_of(engine, prompt, 60) == tokens_of(Engine(decoder), prompt, 60)
