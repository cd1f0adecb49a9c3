"""The speculative step: draft tokens and accept walk against plain lists, answers against the exact
engine, token for token."""

import itertools

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
from eepass.runtime.step import speculating, text_drafts
from eepass.runtime.step.build_speculative import build_speculative_step
from eepass.runtime.step.data import check_step
from eepass.runtime.step.host import Flags, HostDriven, called
from eepass.runtime.step.interpret import Interpreter
from eepass.runtime.step.speculative_engine import SpeculativeEngine
from eepass.runtime.step.tree_shape import TreeShape

SIZE = 40
PROMPTS = ([5, 9, 44, 7, 8], [61, 12, 90, 3, 3, 17, 101, 55, 4, 30, 31], [7, 8] * 6, [3])


@pytest.fixture(scope="module")
def decoder(llama):
    with torch.no_grad():
        splits = split_for_rows(llama, 176, (*BUCKETS, 16, 32), 16)[0]
    return Decoder(splits, eager_compile)


SHAPES = {
    1: TreeShape(), 4: TreeShape((3,)), 8: TreeShape((7,)), "8 in a tree": TreeShape((4, 2, 1)),
    16: TreeShape((9, 4, 2)), 32: TreeShape((12, 8, 6, 5)),
}  # fmt: skip


def plain_drafts(text, branches):
    """What followed the latest of the likest earlier places, by comparing lists: a chain a branch,
    None where there is no place, each beginning with a token of its own."""
    last, begun, chains = len(text) - 1, set(), []
    for count in branches:
        best, place = 0, None
        for at in range(last):
            length = 0
            while length < text_drafts.COMPARED and length <= at:
                if text[at - length] != text[last - length]:
                    break
                length += 1
            if length and length >= best and text[at + 1] not in begun:
                best, place = length, at
        if place is None:
            chains.append(None)
            continue
        period = text[place + 1 :]
        begun.add(period[0])
        chains.append([period[index % len(period)] for index in range(count)])
    return chains


@settings(max_examples=200, deadline=None)
@given(
    text=st.lists(st.integers(0, 3), min_size=1, max_size=20),
    branches=st.sampled_from([(1,), (3,), (7,), (4, 2, 1), (2, 3)]),
)
def test_draft_tokens_are_those_of_plain_lists(text, branches):
    history = torch.full((SIZE,), 9)
    # what lies behind the last token is of another text
    history[len(text) :] = torch.arange(SIZE - len(text)) % 4
    history[: len(text)] = torch.tensor(text)
    ids, parents = torch.zeros(2, sum(branches), dtype=torch.long)
    known = torch.zeros(sum(branches), dtype=torch.bool)
    position = torch.tensor([len(text) - 1])
    text_drafts.draft(history, position, ids, parents, known, branches=branches, first=5)
    row = 5
    for chain, count in zip(plain_drafts(text, branches), branches, strict=True):
        assert parents[row - 5 : row - 5 + count].tolist() == [0, *range(row, row + count - 1)]
        assert known[row - 5 : row - 5 + count].tolist() == [chain is not None] * count
        assert chain is None or ids[row - 5 : row - 5 + count].tolist() == chain
        row += count


def random_parents(data, rows):
    return [0, *(data.draw(st.integers(0, row - 1)) for row in range(1, rows))]


def path_to(parents, row):
    return [*path_to(parents, parents[row]), row] if row else [0]


@settings(max_examples=200, deadline=None)
@given(data=st.data(), rows=st.sampled_from([1, 2, 8, 16, 32]))
def test_rows_and_their_paths_are_those_of_plain_lists(data, rows):
    parents = random_parents(data, rows)
    drafts = torch.arange(20, 20 + rows - 1)
    history, position = torch.arange(SIZE) + 3, torch.tensor([10])
    ids, above, paths, positions, slots = torch.zeros(5, rows, dtype=torch.long)
    speculating.place(
        history, position, torch.tensor([14]), drafts, torch.tensor(parents[1:], dtype=torch.long),
        ids, above, paths, positions, slots,
    )  # fmt: skip
    assert ids.tolist() == [13, *drafts.tolist()] and above.tolist() == parents
    assert slots.tolist() == list(range(10, 10 + rows))
    walks = [path_to(parents, row) for row in range(rows)]
    assert paths.tolist() == [sum(1 << row for row in walk) for walk in walks]
    assert positions.tolist() == [min(10 + len(walk) - 1, 14) for walk in walks]
    # by slots, of one whose values say for which position they are
    mask = torch.stack([torch.arange(60) - 100 * (torch.arange(60) > at) for at in positions])
    found = speculating.tree_mask(mask, position, paths)
    for row, walk in enumerate(walks):
        expected = [-41] * 60
        expected[:10] = range(10)
        for depth, node in enumerate(walk):
            expected[10 + node] = mask[row, 10 + depth].item()
        assert found[row].tolist() == expected


def plain_accept(parents, ids, known, tokens, finite, stop, room, stopped):
    """The rows that are kept, and whether the sequence has ended: all paths walked, the first of
    the longest taken."""
    best, ended = [], stopped

    def walk(row, path):
        nonlocal best, ended
        if len(path) == room:
            return
        path = [*path, row]
        ends = tokens[row] in stop or not finite[row]
        if len(path) > len(best):
            best, ended = path, ends
        if not ends:
            for child in range(row + 1, len(ids)):
                if parents[child] == row and known[child] and ids[child] == tokens[row]:
                    walk(child, path)

    if not stopped:
        walk(0, [])
    return best, ended or len(best) >= room


@settings(max_examples=400, deadline=None)
@given(data=st.data(), stopped=st.booleans(), room=st.integers(1, 9), kind=st.booleans())
def test_the_accept_walk_is_that_of_plain_lists(data, stopped, room, kind):
    rows = data.draw(st.sampled_from([1, 2, 4, 8, 32]))
    parents = random_parents(data, rows) if kind else [0, *range(rows - 1)]
    some = st.lists(st.integers(3, 5), min_size=rows, max_size=rows)
    mostly = st.lists(st.sampled_from([True] * 5 + [False]), min_size=rows, max_size=rows)
    ids, known, finite = data.draw(some), data.draw(mostly), data.draw(mostly)
    # equal children of equal rows have equal tokens, as from a model
    by_path = {}
    texts = [tuple(ids[node] for node in path_to(parents, row)) for row in range(rows)]
    tokens = [by_path.setdefault(t, d) for t, d in zip(texts, data.draw(some), strict=True)]
    history, position = torch.zeros(SIZE + 32, dtype=torch.long), torch.tensor([10])
    flag, moved = torch.tensor([stopped]), torch.zeros(1, dtype=torch.bool)
    path, out = torch.zeros(rows, dtype=torch.long), torch.zeros(rows + 1, dtype=torch.long)
    counters = torch.zeros(len(speculating.COUNTED), dtype=torch.long)
    best = torch.tensor([0.0 if good else torch.inf for good in finite])
    paths = torch.tensor([sum(1 << n for n in path_to(parents, row)) for row in range(rows)])
    speculating.accept(
        torch.tensor(ids), torch.tensor(parents), paths, torch.tensor(known[1:], dtype=torch.bool),
        torch.tensor(tokens), best, torch.tensor([5, -2]), torch.tensor([10 + room]), history,
        position, flag, counters, path, moved, out,
    )  # fmt: skip
    kept, ended = plain_accept(parents, ids, known, tokens, finite, {5}, room, stopped)
    shown = [tokens[row] if finite[row] else -1 for row in kept]
    assert out.tolist() == [len(kept), *shown, *[-2] * (rows - len(kept))]
    assert position.item() == 10 + len(kept) and flag.item() == ended
    assert path.tolist() == [*kept, *range(len(kept), rows)]
    assert moved.item() == (kept != list(range(len(kept))))
    written = [tokens[row] for row in kept]
    assert history.tolist() == [*[0] * 11, *written, *[0] * (SIZE + 21 - len(kept))]
    assert counters.tolist() == [int(not stopped), len(kept)]


def engine_over(decoder, how="host", rows=8, stop=(), draws=False, in_flight=2, head=None):
    shape = SHAPES.get(rows, rows)
    step = build_speculative_step(decoder, shape, stop, draws, head=head)
    check_step(step)
    if how in ("interpret", "predicated"):
        executor = Interpreter(step if how == "interpret" else step.flattened())
    else:
        flags = LateFlags(step.flags) if how == "late" else Flags()
        executor = HostDriven(step, flags, called(step))
    results = LateResultQueue(step["out"])
    return SpeculativeEngine(decoder, step, executor, results, in_flight, head=head)


def tokens_of(engine, prompt, count, **options):
    return [step.token for step in engine.generate(prompt, count, **options)]


EXECUTORS = [
    *itertools.product(("host", "late"), SHAPES), ("interpret", 8), ("interpret", 16),
    ("predicated", "8 in a tree"), ("predicated", 32),
]  # fmt: skip


@pytest.mark.parametrize(("how", "rows"), EXECUTORS)
def test_answers_are_those_of_the_exact_engine_in_fewer_passes(decoder, how, rows):
    engine, passes, tokens = engine_over(decoder, how, rows), 0, 0
    for prompt in PROMPTS:
        count = 100 - len(prompt)
        expected = tokens_of(Engine(decoder), prompt, count)
        assert tokens_of(engine, prompt, count) == expected
        found = engine.statistics
        passes, tokens = found.passes, found.tokens
    chain = SHAPES[rows].is_chain
    # a host that cannot see the flags waits for one, whether the path lies apart
    assert tokens > 300 and bool(engine.executor.synchronisations) == (how == "late" and not chain)
    # the tiny model falls into repetition, which its text foretells
    assert passes < tokens / 2 if rows != 1 else passes >= tokens


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
    engine = engine_over(decoder, rows="8 in a tree")
    for prompt in PROMPTS[1:3]:
        assert tokens_of(engine, prompt, 60) == tokens_of(Engine(decoder), prompt, 60)
