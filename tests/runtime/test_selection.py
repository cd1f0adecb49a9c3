"""Selected context: against a plain reference, beside short texts, with drafts, refused."""

from dataclasses import replace

import pytest
import torch
from models import VOCABULARY, eager_compile, random_artifact, tiny_model

from eepass.config import ExitConfig
from eepass.errors import InputError
from eepass.model import EarlyExitModel, split_model, transform
from eepass.passes.report import PassReport
from eepass.runtime.context.selection import FIRST, LATEST, LONG, Recent, Selection

TOKENS, LENGTH = 128, 280
ONE_BY_ONE = ExitConfig(
    guarantee="approximate", exits=False, speculate="off", context="recent", context_tokens=TOKENS
)


def text(count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (count,), generator=generator).tolist()


@pytest.fixture(scope="module")
def made(llama):
    """A tiny llama with room for long texts, run as it was traced; tests configure it."""
    splits, _ = split_model(llama, 420, (1, 2, 8))
    artifact = random_artifact(llama)
    return EarlyExitModel(splits, PassReport(), frozenset(), artifact, compiler=eager_compile)


def generated(engine, ids, count):
    return [step.token for step in engine.generate(ids, count)]


class Even(Selection):
    """Every so many tokens of those there are."""

    def _choose(self, layer, text, queries, end, count):
        return torch.linspace(FIRST, end - 1, count).long()


def plain(model, ids, count, selection):
    """Greedy decoding without a cache, each row under the mask of the tokens selected for it."""
    tokens = list(ids)
    while len(tokens) < len(ids) + count:
        size = len(tokens)
        seen = torch.ones(size, size, dtype=torch.bool).tril()
        for row in range(max(len(ids), LONG * TOKENS), size):
            end = row + 1
            seen[row] = False
            chosen = selection._choose(0, None, None, end - LATEST, TOKENS - FIRST - LATEST)
            seen[row, chosen] = seen[row, :FIRST] = seen[row, end - LATEST : end] = True
        mask = torch.zeros(size, size).masked_fill(~seen, torch.finfo(torch.float32).min)
        logits = model(torch.tensor([tokens]), attention_mask=mask[None, None]).logits[0, -1]
        tokens.append(int(logits.argmax()))
    return tokens[len(ids) :]


@pytest.mark.parametrize("selection", (Recent(TOKENS), Even(TOKENS, [0])), ids=("recent", "even"))
@pytest.mark.parametrize("length", (LENGTH, LONG * TOKENS - 8))
def test_tokens_are_those_of_a_plain_reference(llama, made, selection, length):
    engine = made.configure(ONE_BY_ONE)
    engine.selection = selection
    wanted = plain(llama, text(length), 24, selection)
    assert generated(engine, text(length), 24) == wanted
    # so many tokens from the middle matter
    assert generated(made.dense, text(length), 24) != wanted


def test_what_a_layer_attends_to_most_is_selected(llama, made):
    """The weights that the model itself reports, of the token that is run."""
    ids, count = text(LENGTH), TOKENS - FIRST - LATEST
    engine = made.configure(replace(ONE_BY_ONE, context="selected"))
    sequence = engine.start(ids)
    chosen, choose = {}, engine.selection._choose
    engine.selection._choose = lambda layer, *rest: chosen.setdefault(layer, choose(layer, *rest))
    engine.step()
    # layers before the first that selects attend to all, as the model does
    first = min(engine.selection.layers)
    eager = tiny_model("llama", attn_implementation="eager")
    seen = eager(torch.tensor([sequence.tokens[:-1]]), output_attentions=True).attentions[first]
    weights = seen[0, :, -1, :-1].clone()
    weights = (weights / weights.sum(-1, keepdim=True)).mean(0)[FIRST : LENGTH + 1 - LATEST]
    wanted = weights.topk(count).indices.sort().values + FIRST
    assert sorted(chosen) == [1, 3]
    assert chosen[first].tolist() == wanted.tolist()
    # the latest of them would be others
    assert wanted[0] < LENGTH + 1 - LATEST - count
    engine.reset()


def test_the_latest_tokens_alone_are_further_from_dense_attention(made):
    """So it is the choice that counts."""

    def values(engine, ids):
        """Of the first generated token, in the last layer."""
        sequence = engine.start(ids)
        engine.step()
        found = made.decoder.kv.values[-1][0, :, sequence.first_slot + len(ids)].clone()
        engine.end(sequence)
        return found

    def apart(engine, ids):
        return float((values(engine, ids) - values(made.dense, ids)).norm())

    texts = [text(300, seed) for seed in range(6)]
    own = made.configure(replace(ONE_BY_ONE, context="selected"))
    by_attention = sum(apart(own, ids) for ids in texts)
    latest = made.configure(ONE_BY_ONE)
    assert by_attention < 0.9 * sum(apart(latest, ids) for ids in texts)


def test_a_short_text_beside_a_long_one_has_the_bits_of_dense_decoding(llama):
    """Compiled: its list of slots names all there are."""
    made = transform(llama, max_length=440)
    short, count = text(60, seed=2), 12
    dense = made.dense
    wanted = generated(dense, short, count)
    slots = [layer[:, :, : len(short) + count - 1].clone() for layer in made.decoder.kv.keys]
    engine = made.configure(ONE_BY_ONE)
    first = engine.start(short, count, capacity=100)
    long = engine.start(text(LENGTH), count, capacity=330)
    assert first.first_slot == 0 and long.first_slot > 0
    for _ in range(count - 1):
        engine.step()
    assert first.tokens[len(short) :] == wanted
    for own, layer in zip(slots, made.decoder.kv.keys, strict=True):
        assert torch.equal(layer[:, :, : len(short) + count - 1], own)
    apart = long.tokens
    engine.reset()
    assert apart[LENGTH:] == generated(engine, text(LENGTH), count)


def test_a_text_of_no_more_tokens_is_attended_to_in_full(made):
    ids = text(LENGTH)
    wanted = generated(made.dense, ids, 20)
    assert generated(made.configure(replace(ONE_BY_ONE, context_tokens=155)), ids, 20) == wanted
    # as many as the cache has slots: nothing is compiled for it
    assert made.configure(replace(ONE_BY_ONE, context_tokens=5000)).selection is None


def test_it_goes_with_drafts_and_exits(made):
    ids = text(40) * 7
    for options in (
        {"context": "selected"},
        {"speculate": "suffix"},
        {"exits": True},
        {"exits": True, "adaptive": False},
    ):
        engine = made.configure(replace(ONE_BY_ONE, **options))
        assert len(generated(engine, ids, 40)) == 40
        assert engine.statistics.tokens >= 39
    repeating = made.configure(replace(ONE_BY_ONE, speculate="suffix", adaptive=False))
    generated(repeating, ids, 40)
    # rows of drafts see the tokens before them
    assert repeating.statistics.passes < 39


def test_what_cannot_select_is_refused(made):
    with pytest.raises(ValueError, match="context='recent': must be full, unless guarantee"):
        ExitConfig(context="recent")
    with pytest.raises(ValueError, match="context_tokens=64: must be at least 128"):
        ExitConfig(context_tokens=64)
    eager = tiny_model("llama", attn_implementation="eager")
    with pytest.raises(InputError, match="context='recent': layer 0 reads its keys"):
        transform(eager, config=ONE_BY_ONE, max_length=440)
