"""A step computes the masks of its rows from their positions, and holds no table of them."""

import pytest
import torch
from models import eager_compile, tiny_model
from steps import BUCKETS, OrderedExits, engine_for

from eepass.passes.pipeline import split_for_rows
from eepass.runtime.decoder.decoder import Decoder
from eepass.runtime.engine.engine import Engine
from eepass.runtime.step.build import build_step
from eepass.runtime.step.layout import StepOptions


@pytest.fixture(scope="module")
def decoder():
    """With full and sliding attention, and so with two masks."""
    return Decoder(split_for_rows(tiny_model("gemma3"), 128, BUCKETS, 16)[0], eager_compile)


@pytest.mark.parametrize("count", BUCKETS)
def test_rows_of_masks_by_position(decoder, count):
    sides = decoder.side_inputs
    assert len(sides.masks) == 2
    positions = torch.tensor([90, 3, 127, 40, 8, 7, 0, 64])[:count]
    for name, found in sides.masks_at(positions).items():
        dim = sides.row_dim[name]
        rows = [sides._mask_rows(name, at, 1) for at in positions.tolist()]
        assert torch.equal(found, torch.cat(rows, dim))


def test_no_buffer_grows_with_the_square_of_the_cache(decoder):
    step = build_step(decoder, OrderedExits((1, 2), [], [1], [1]), StepOptions(buckets=BUCKETS))
    masks = [step[f"side {name}"] for name in decoder.side_inputs.masks]
    assert [mask.numel() for mask in masks] == [8 * decoder.cache_length] * 2
    assert step.nbytes < 3 * sum(mask.nbytes for mask in masks)


@pytest.mark.parametrize("how", ("interpret", "predicated", "late"))
def test_steps_of_a_model_with_windows_give_the_tokens_of_the_engine(decoder, how):
    prompt = [5, 9, 44, 7, 8, 61, 12, 90, 3, 17, 101]
    tokens = [step.token for step in engine_for(decoder, None, how).generate(prompt, 40)]
    assert tokens == [step.token for step in Engine(decoder).generate(prompt, 40)]
