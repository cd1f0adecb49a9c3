"""Chunks of a prompt wider than other passes: the tokens, keys and values of passes of 64 rows."""

from types import SimpleNamespace

import pytest
import torch
from families.table import FAMILIES
from families.table import tiny_model as family_model
from made_heads import drafts_of
from models import VOCABULARY, eager_compile, random_artifact, tiny_model

from eepass import model as transforming
from eepass.codegen.lower_cuda import CudaCompiler
from eepass.config import ExitConfig
from eepass.early_exit_model import EarlyExitModel
from eepass.ops import rows as ops
from eepass.passes.pipeline import split_for_rows
from eepass.passes.report import PassReport
from eepass.runtime.decoder.decoder import Decoder
from eepass.runtime.decoder.side_inputs import Row
from eepass.runtime.engine.engine import Engine
from eepass.runtime.step.launching import choose, make_engine
from eepass.runtime.step.layout import StepOptions
from eepass.runtime.step.tree_shape import TreeShape

CPU = torch.device("cpu")
PROMPT = torch.randint(3, VOCABULARY, (1100,), generator=torch.Generator().manual_seed(4)).tolist()
STEPS = {
    "dense": ExitConfig(),
    "exits": ExitConfig().approximate(),
    "exact": ExitConfig(exits=False, speculate="suffix"),
}


def uncompiled(graph, examples):
    return eager_compile(graph, "", examples)


@pytest.fixture(scope="module", params=("llama", "gemma3"))
def model(request):
    """With full attention, and with sliding attention too."""
    return tiny_model(request.param, max_position_embeddings=2048)


@pytest.fixture(scope="module")
def splits(model):
    """In passes of up to 64 rows, and in chunks of 256 and 1024."""
    with torch.no_grad():
        narrow = split_for_rows(model, 1472, (1, 8), 64)[0]
        return narrow, split_for_rows(model, 1472, (1, 8), 256, wide_rows=(1024,))[0]


def recorded(decoder):
    """The row count of each pass that goes layer by layer, as they come."""
    sizes, embed = [], decoder.embed

    def noted(ids, positions, slots):
        sizes.append(ids.shape[1])
        return embed(ids, positions, slots)

    decoder.embed = noted
    return sizes


def same_cache(one, other, count):
    for kind in ("keys", "values"):
        for ours, theirs in zip(getattr(one.kv, kind), getattr(other.kv, kind), strict=True):
            found, expected = ours[:, :, :count], theirs[:, :, :count]
            assert expected[:, :, -1].any()
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("how", STEPS)
def test_captured_steps_follow_the_same_prompt(model, splits, how):
    artifact, found = random_artifact(model), []
    for split, compiler in zip(splits, (None, CudaCompiler(uncompiled)), strict=True):
        made = EarlyExitModel(
            split, PassReport(), frozenset(), artifact, compiler=compiler or eager_compile,
            launching=choose("host", CPU),
        )  # fmt: skip
        made.configure(STEPS[how], dense=how == "dense")
        sizes = recorded(made.decoder)
        tokens = [tuple(token) for token in made.stream(PROMPT, 12)]
        # steps embed rows of their own
        found.append((made.decoder, tokens, [size for size in sizes if size > 8]))
    (narrow, expected, before), (wide, tokens, sizes) = found
    assert tokens == expected
    assert before == [64] * 18 and sizes == [1024, 256]
    same_cache(wide, narrow, len(PROMPT) + 8)


def test_the_draft_head_follows_chunks(splits):
    found = []
    for split, wide in zip(splits, (None, CudaCompiler(uncompiled).wide), strict=True):
        decoder = Decoder(split, eager_compile, wide=wide)
        shape = TreeShape((3,), 4, 2)
        options, head = StepOptions(tree=shape), drafts_of(decoder)
        launching = choose("interpret", CPU)
        engine, _ = make_engine(decoder, None, options, launching, head=head)
        with torch.no_grad():
            tokens = [token.token for token in engine.generate(PROMPT, 20)]
        found.append((tokens, engine.step["counters"].tolist(), engine.step["head keys"].clone()))
    assert found[0][:2] == found[1][:2]
    torch.testing.assert_close(found[0][2], found[1][2], atol=1e-4, rtol=1e-4)


def test_an_engine_runs_chunks_wherever_a_sequence_lies(splits):
    """Where padding has no room behind a prompt, its end goes in passes of few rows."""
    found, second = [], PROMPT[300:1000]
    for split, wide in zip(splits, (None, CudaCompiler(uncompiled).wide), strict=True):
        decoder = Decoder(split, eager_compile, wide=wide)
        engine, sizes = Engine(decoder), recorded(decoder)
        with torch.no_grad():
            # no more room than their tokens take
            sequences = [engine.start(ids, capacity=len(ids) + 8) for ids in (PROMPT[:300], second)]
            sizes = list(sizes)
            for _ in range(6):
                engine.step()
        found.append((decoder, [sequence.tokens for sequence in sequences], sizes))
    (narrow, expected, _), (wide, tokens, sizes) = found
    assert tokens == expected
    assert sizes == [256, *[8] * 6, *[256] * 2, *[8] * 24]
    same_cache(wide, narrow, 300 + 8 + 700)


def test_a_chunk_is_as_wide_as_is_well_filled(splits):
    narrow, wide = splits
    decoder = Decoder(wide, eager_compile, wide=eager_compile)
    counts = (1, 8, 9, 256, 257, 768, 769, 1024, 1025, 5000)
    chunks = [decoder.chunk(left, 10**4) for left in counts]
    assert chunks == [1, 8, 256, 256, 256, 256, 1024, 1024, 1024, 1024]
    assert [decoder.chunk(900, room) for room in (1024, 1023, 256, 255)] == [1024, 256, 256, 8]
    # as much room for padding as the smallest chunk has rows
    assert decoder.capacity == decoder.kv.scratch == 1472 - 256
    # nothing takes a prefix
    decoder = Decoder(narrow, eager_compile)
    assert [decoder.chunk(left, 10**4) for left in (1, 9, 64, 65)] == [1, 64, 64, 64]
    assert decoder.capacity == 1472 - 64


def test_two_small_chunks_take_the_place_of_one_that_is_half_empty():
    """On a CPU, which computes padding as long as other rows; the text is the same."""
    prompt, found = [(7 * at) % 90 + 5 for at in range(120)], []
    for rows in ((1, 4, 16), (1, 4)):
        splits = split_for_rows(tiny_model("llama"), 256, rows, 64)[0]
        engine = Engine(Decoder(splits, eager_compile))
        sizes = recorded(engine.decoder)
        for count in (17, 32, 33, 84, 97):
            sequence = engine.start(prompt[:count])
            found.append(sequence.tokens)
            engine.end(sequence)
        if 16 in rows:
            assert sizes == [16, 1, 16, 16, 64, 64, 16, 4, 64, 64]
    assert found[:5] == found[5:]


def test_chunks_read_no_mask(splits, monkeypatch):
    """They have three numbers instead, and attention is torch's over the text so far."""
    compiler = CudaCompiler(uncompiled)
    decoder = Decoder(splits[1], compiler, wide=compiler.wide)
    place = decoder.side_inputs.span(100, 256)
    assert {place.sides[name].numel() for name in decoder.side_inputs.masks} == {3}
    seen, attend = [], torch.nn.functional.scaled_dot_product_attention

    def noted(q, k, v, *rest, **options):
        seen.append(k.shape[2])
        return attend(q, k, v, *rest, **options)

    monkeypatch.setattr(ops, "F", SimpleNamespace(scaled_dot_product_attention=noted))
    with torch.no_grad():
        rows = [Row(0, at, at) for at in range(100, 356)]
        decoder.forward(PROMPT[:256], rows, decoder.cache_length)
    windows = decoder.side_inputs.windows.values()
    # a window of 8 reaches 7 tokens back
    assert set(seen) == {356} | {256 + window - 1 for window in windows if window}
    assert len(seen) == 4


def test_rows_that_are_no_chunk_are_refused(splits):
    decoder = Decoder(splits[1], eager_compile, wide=CudaCompiler(uncompiled).wide)
    apart = [Row(0, at, 2 * at) for at in range(200)]
    with pytest.raises(ValueError, match="256 rows are not contiguous"):
        decoder.place(apart, 256, decoder.cache_length)


@pytest.mark.parametrize(
    ("family", "chunks"), [("falcon, alibi", [128, 128]), ("bloom", [256])], ids=("mask", "layers")
)
def test_biases_in_a_mask_keep_chunks_small(family, chunks):
    """Such a mask grows with the rows, by head; layers that add biases themselves do as others."""
    model, ids = family_model(FAMILIES[family]), [token % 96 for token in PROMPT[:200]]
    with torch.no_grad():
        splits = split_for_rows(model, 640, (1, 8), 128, wide_rows=(256,))[0]
        wide = Decoder(splits, eager_compile, wide=CudaCompiler(uncompiled).wide)
        narrow = Decoder({rows: splits[rows] for rows in (1, 8)}, eager_compile)
        for decoder, expected in ((wide, chunks), (narrow, [8] * 25)):
            engine, sizes = Engine(decoder), recorded(decoder)
            engine.start(ids)
            assert sizes == expected
    same_cache(wide, narrow, 200)


@pytest.mark.parametrize(("length", "wide"), [(768, ()), (769, (1024,))])
def test_a_model_on_a_gpu_is_split_for_chunks_that_its_texts_fill(monkeypatch, length, wide):
    monkeypatch.setattr(transforming, "_prefill_rows", lambda model: transforming.CHUNK_ROWS)
    model = tiny_model("llama", max_position_embeddings=1024)
    splits, _ = transforming.split_model(model, length, (1, 8))
    assert set(splits) == {1, 8, 256, *wide}
    assert splits[1].cache_length == -(-(length + 256) // 64) * 64
