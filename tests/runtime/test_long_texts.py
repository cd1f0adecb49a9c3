"""Long texts: chunks of a prompt, windows, the last position, the end of the cache, flat memory."""

import gc
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families.table import FAMILIES
from families.table import tiny_model as family_model
from made_heads import reader
from models import VOCABULARY, eager_compile, random_artifact, tiny_model
from plain import PlainEngine, RandomDraft

from eepass.config import ExitConfig
from eepass.errors import EngineError
from eepass.masks import causal_mask
from eepass.model import EarlyExitModel, split_model, transform
from eepass.passes.pipeline import split_for_rows
from eepass.passes.report import PassReport
from eepass.runtime.decoder import side_inputs
from eepass.runtime.decoder.decoder import Decoder
from eepass.runtime.decoder.side_inputs import Row
from eepass.runtime.drafting import eagle_tree
from eepass.runtime.drafting.cascade import Cascade
from eepass.runtime.drafting.eagle_head import EagleHead
from eepass.runtime.drafting.eagle_layer import HeadStyle
from eepass.runtime.drafting.eagle_tree import EagleTree
from eepass.runtime.drafting.features import before
from eepass.runtime.drafting.suffix import EarlierTexts, SuffixDraft
from eepass.runtime.engine.engine import Engine
from eepass.runtime.engine.options import Options

SPECULATION = Options("exact", modes=("speculation",))


def decoder_of(model, slots=192, rows=(1, 8), prefill=16):
    return Decoder(split_for_rows(model, slots, rows, prefill)[0], eager_compile)


def text(count, most=VOCABULARY):
    return [5 + 7 * i * i % (most - 5) for i in range(count)]


@pytest.fixture(scope="module")
def model():
    """A transformed model with room for long answers, its segments run as they were traced."""
    original = tiny_model("llama", num_hidden_layers=3, max_position_embeddings=1024)
    splits, _ = split_model(original, 700, (1, 8))
    artifact = random_artifact(original)
    return EarlyExitModel(splits, PassReport(), frozenset(), artifact, compiler=eager_compile)


def test_a_prompt_in_chunks_is_the_prompt_at_once(llama):
    ids = text(100)
    chunks, once = decoder_of(llama), decoder_of(llama, slots=256, rows=(1,), prefill=112)
    seen = []
    for decoder in (chunks, once):
        engine, calls = Engine(decoder), []
        forward = decoder.forward
        decoder.forward = lambda *a, f=forward, c=calls: c.append(len(a[0])) or f(*a)
        sequence = engine.start(ids)
        cache = [k[:, :, :100].clone() for k in (*decoder.kv.keys, *decoder.kv.values)]
        seen.append((calls, sequence.tokens[-1], cache))
        engine.reset()
    (many, token, ours), (one, other, theirs) = seen
    assert many == [16] * 6 + [4] and one == [100]
    assert token == other == PlainEngine(llama).next_token(ids)
    for mine, wanted in zip(ours, theirs, strict=True):
        assert torch.allclose(mine, wanted, atol=2e-5)


def test_a_prompt_leaves_no_states_of_all_its_tokens(monkeypatch, model):
    """The features of a prompt are kept chunk by chunk, for the draft head to read."""
    engine = model.configure(ExitConfig(speculate="eagle", adaptive=False))
    followed = []
    follow = EagleTree.follow

    def watched(self, tokens):
        followed.append(list(tokens))
        follow(self, tokens)

    monkeypatch.setattr(EagleTree, "follow", watched)
    ids = text(200)
    sequence = engine.start(ids)
    features = before(0, len(ids) + 1, sequence.features_at)
    engine.end(sequence)
    assert [len(tokens) for tokens in followed] == [64, 64, 64, 8, 1]
    assert [token for tokens in followed[:-1] for token in tokens] == ids
    # each token comes with the features of the token before it, across chunks too
    states = []
    layers = engine.draft.feature_layers

    def keep(layer, hidden):
        states.append((layer, hidden[0].clone()))

    model.dense.prefill(ids, keep)
    norm = engine.draft.head.norm
    z = norm(torch.cat([h for n, h in states if n == 3])[None])[0]
    wanted = torch.cat([z, *(torch.cat([h for n, h in states if n == at]) for at in layers)], -1)
    found = features.value(z.shape[1], norm)
    assert not found[0].any()
    torch.testing.assert_close(found[1:], wanted, atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module", params=("gemma3", "llama4"))
def windowed(request):
    """A model some of whose layers see a window of eight tokens, sliding or in chunks."""
    entry = FAMILIES[request.param]
    options = {**entry.options, "vocab_size": VOCABULARY}
    model = family_model(replace(entry, options=options))
    decoder = decoder_of(model, slots=512)
    assert {abs(w) for w in decoder.splits[1].windows.values() if w} == {8}
    return model, decoder


def test_past_the_window_it_is_the_eager_model(windowed):
    """Prompts longer than the window, in chunks, decoding and trees of drafts further past it."""
    model, decoder = windowed
    plain, ids = PlainEngine(model), text(45)
    wanted = plain.answer(ids, 24)
    assert [step.token for step in Engine(decoder).generate(ids, 24)] == wanted
    for seed in range(3):
        draft = RandomDraft(plain, seed, right=0.6)
        engine = Engine(decoder, draft=draft, options=SPECULATION)
        assert [step.token for step in engine.generate(ids, 24)] == wanted
        assert engine.statistics.passes < 24, "nothing was drafted, nothing tested"
    # the second of two sequences stands elsewhere in the cache
    engine = Engine(decoder)
    first, second = engine.start(ids, 8, capacity=60), engine.start(ids[:30], 8, capacity=60)
    for _ in range(7):
        engine.step()
    assert first.tokens[45:] == wanted[:8]
    assert second.tokens[30:] == plain.answer(ids[:30], 8)
    engine.reset()


def test_masks_are_made_by_the_chunk(windowed, monkeypatch):
    """The same rows as of one mask over all slots, which is never made."""
    monkeypatch.setattr(side_inputs, "KEPT_CHUNKS", 3)
    decoder = windowed[1]
    sides = decoder.side_inputs
    slots = decoder.cache_length
    biggest = max((table.numel() for table in sides.tables.values()), default=0)
    assert biggest <= slots * 64
    whole = {
        name: causal_mask(slots, slots, decoder.splits[1].windows[name], torch.float32)
        for name in decoder.splits[1].windows
    }
    seen = {name: mask[0, 0, 45].count_nonzero() for name, mask in whole.items()}
    at = sides.span(45, 1).sides
    names = {
        mask: next(n for n in sides.masks if at[n].count_nonzero() == count)
        for mask, count in seen.items()
    }
    assert len(set(names.values())) == 2
    for start, rows in ((0, 1), (15, 1), (12, 8), (250, 8), (31, 16), (480, 8)):
        place = sides.span(start, rows)
        for mask, name in names.items():
            assert torch.equal(place.sides[name], whole[mask][:, :, start : start + rows])
    # a sequence elsewhere in the cache sees there what it would see at its beginning
    for first, position, count in ((64, 20, 1), (100, 12, 8), (300, 127, 8)):
        line = [Row(first, at, first + at) for at in range(position, position + count)]
        place, gathered = sides.span(position, count, first), sides.gather(line, count)
        assert torch.equal(place.slots, gathered.slots)
        assert place.sides.keys() == gathered.sides.keys()
        assert all(torch.equal(place.sides[n], gathered.sides[n]) for n in place.sides)
    # a path of drafts with gaps, after a line of its own
    over = (100, 103, 104)
    rows = [Row(64, 36 + i, slot, over[: i + 1]) for i, slot in enumerate(over)]
    place = sides.gather(rows, 8)
    for mask, name in names.items():
        for index, row in enumerate(rows):
            seen = (place.sides[name][0, 0, index] == 0).nonzero().flatten().tolist()
            line = [*range(64, 100), *row.path_slots]
            allowed = whole[mask][0, 0, row.position, : row.position + 1] == 0
            wanted = [slot for slot, yes in zip(line, allowed.tolist(), strict=True) if yes]
            assert seen == wanted
    assert len(sides._mask_chunks) == 3


class WithinItsPositions(PlainEngine):
    """Beyond the positions that the model knows, where drafts are made too: any token."""

    def next_token(self, ids):
        return super().next_token(ids) if len(ids) <= 44 else 5


@pytest.mark.parametrize("family", ("gpt2", "gptj"))
def test_up_to_the_last_position_the_model_knows(family):
    """A table of positions ends there, of embeddings or of rotary values: padding rows, of prompts
    and of trees of drafts, may not read beyond it either."""
    entry = FAMILIES[family]
    options = {**entry.options, "n_positions": 44, "vocab_size": VOCABULARY}
    model = family_model(replace(entry, options=options))
    decoder = decoder_of(model)
    assert decoder.capacity > 44 == decoder.max_sequence_length
    plain = WithinItsPositions(model)
    # the longer one's last chunk is padded past the end
    for ids in (text(30), text(43)):
        for draft in (None, RandomDraft(plain, 1, right=0.8)):
            engine = Engine(decoder, draft=draft, options=None if draft is None else SPECULATION)
            generated = []
            with pytest.raises(EngineError, match="full at 44 tokens: the model knows 44 posi"):
                for step in engine.generate(ids, 100):
                    generated.append(step.token)
            assert generated == plain.answer(ids, 45 - len(ids))
    with pytest.raises(EngineError, match=r"45 tokens.*knows 44 positions"):
        Engine(decoder).start(text(45))
    with pytest.raises(EngineError, match=r"50 tokens.*are asked for.*at most 44: the model"):
        Engine(decoder).start(text(30), capacity=50)
    # two of that length fit the cache all the same
    engine, ids = Engine(decoder), text(30)
    pair = [engine.start(ids, 5), engine.start(ids, 5)]
    for _ in range(4):
        engine.step()
    assert pair[0].tokens == pair[1].tokens == [*ids, *plain.answer(ids, 5)]
    engine.reset()


def test_frequencies_that_change_with_the_length_bound_the_text():
    entry = FAMILIES["phi3"]
    factors = {"short_factor": [1.0] * 4, "long_factor": [3.0, 5.0, 7.0, 9.0]}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, **factors}
    options = {"original_max_position_embeddings": 24, "rope_parameters": rope}
    model = family_model(replace(entry, options={**entry.options, **options}))
    decoder = decoder_of(model, slots=128)
    assert decoder.max_sequence_length == 24
    ids, plain = text(14, 96), PlainEngine(model)
    assert [s.token for s in Engine(decoder).generate(ids, 10)] == plain.answer(ids, 10)
    # there is something to get wrong: one more token turns all of them otherwise
    short = model(torch.tensor([text(24, 96)])).logits[0, :24]
    assert not torch.allclose(short, model(torch.tensor([text(25, 96)])).logits[0, :24], atol=1e-2)


def test_text_drafts_remember_no_more_than_they_reach(monkeypatch):
    monkeypatch.setattr(SuffixDraft, "REACH", 16)
    earlier = EarlierTexts(reach=16)
    draft = SuffixDraft(earlier)
    for token in range(5000):
        draft.follow([token % 997])
        earlier.add([token % 997] * 3)
    text = draft.text
    assert len(text._older) <= 2 * 16 and len(text._newest) <= 2 * len(text._older)
    assert sum(len(index.tokens) for index in earlier.indexes) <= 4 * 16
    last = text.tokens[-12:]
    draft.follow(last[:4])
    assert draft.continuation([], 8)[0] == [*last[4:], *last[:4]][:8]


def test_a_head_that_did_not_run_for_long_gives_the_same(monkeypatch):
    monkeypatch.setattr(eagle_tree, "WINDOW", 512)
    tokens, features, head = text(1400), None, eagle_head()
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(2600, head.feature_size, generator=generator)
    features[0], read = 0, reader(features)
    (wanted,) = head.fresh().begin(tokens, features[:1400], levels=1)
    tree = EagleTree(head, lambda hidden: hidden)
    for begin in range(0, 1400, 7):
        tree.follow(tokens[begin : begin + 7])
        assert len(tree._tokens) <= 2 * 512
    assert tree.candidates(6, read).tolist() == wanted.tokens
    assert tree.head.length == 1400
    # rolled back to tokens it never ran, it goes on
    tree.follow(tokens[:1100])
    tree.truncate(1405)
    tree.follow([7])
    assert len(tree.candidates(6, read)) == 6 and tree.head.length == 1406


def eagle_head():
    torch.manual_seed(0)
    style = HeadStyle(64, 4, 2, 100.0 ** -torch.arange(0, 1, 1 / 8), 128)
    tensors = {
        f"eagle.{name}": torch.randn(shape) * (shape[-1] ** -0.5 if len(shape) > 1 else 1)
        for name, shape in style.shapes().items()
    }
    embedding, hot = torch.randn(VOCABULARY, 64), torch.arange(0, VOCABULARY, 2)
    tensors |= {"eagle.features": torch.tensor([1, 2]), "eagle.rotary": style.rotary}
    tensors |= {"eagle.hot.ids": hot, "eagle.hot.head": embedding[hot]}
    return EagleHead(tensors, embedding, eager_compile)


def held(root, spared=()):
    """Entries of all containers, and bytes of all tensors, that ``root`` reaches."""
    entries = nbytes = 0
    seen, stack = {id(each) for each in spared}, [root]
    while stack:
        item = stack.pop()
        if id(item) in seen or isinstance(item, type | torch.nn.Module | torch.fx.Graph):
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            nbytes += item.untyped_storage().nbytes()
            continue
        if isinstance(item, list | dict | set | tuple) or type(item).__name__ == "deque":
            entries += len(item)
        if (
            type(item).__module__.startswith("eepass.")
            or isinstance(item, list | dict | set | tuple | frozenset)
            or type(item).__name__ == "deque"
        ):
            stack += gc.get_referents(item)
    return entries, nbytes


@pytest.mark.parametrize("way", ("idle", "speculation", "exits"))
def test_nothing_grows_with_the_answer(way, monkeypatch, model):
    """Of each token its id and exit layer are kept, and nothing else."""
    monkeypatch.setattr(SuffixDraft, "REACH", 16)
    monkeypatch.setattr(eagle_tree, "WINDOW", 32)
    if way == "exits":
        engine = model.configure(ExitConfig(adaptive=False, speculate="off"))
    else:
        engine = model.configure(ExitConfig(adaptive=False, exits=False))
        assert isinstance(engine.draft, Cascade)
    if way == "idle":
        # the draft follows the tokens, in case drafting pays again, and is not called
        options = Options("exact", modes=("dense",))
        engine = Engine(model.decoder, engine.exits, None, engine.draft, options)
    sequence = engine.start(text(40))
    sizes = []
    for count in (200, 400, 600):
        while len(sequence.tokens) < count:
            engine.step()
            sequence.take_confirmed()
        spared = [sequence.tokens, sequence.exit_layers, model.decoder]
        if isinstance(sequence.draft, Cascade):
            spared.append(sequence.draft.text.text.tokens)
        sizes.append(held([engine, sequence], spared))
    (entries, nbytes), (more, larger) = sizes[0], sizes[-1]
    # bounded things fill up; what is kept of each of 400 tokens would be more
    assert more - entries < 300 and larger - nbytes < 40_000, sizes
    used = engine.statistics
    if way == "exits":
        assert used.mean_exit_layer < 3 and used.rollbacks
    engine.reset()


def resident():
    """Bytes of this process that lie in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
def test_ten_thousand_tokens_in_flat_memory():
    model = tiny_model("llama", num_hidden_layers=2, max_position_embeddings=10_240)
    transformed = transform(model, random_artifact(model), max_length=10_240)
    sizes = {}
    for count, _ in enumerate(transformed.stream(text(40), 10_000), 1):
        if count in (3_000, 10_000):
            gc.collect()
            sizes[count] = resident()
    assert set(sizes) == {3_000, 10_000}
    # of 7,000 tokens their ids stay, and nothing of the size of a state: 256 bytes each
    assert sizes[10_000] - sizes[3_000] < 7_000 * 3 * 256, sizes
