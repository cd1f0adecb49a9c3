"""A row of a wide model has the same bits alone and with others, whatever the threads."""

import pytest
import torch
from models import tiny_model

import eepass
from eepass.codegen.lower_cpu import SETTINGS
from eepass.runtime.decoder.side_inputs import Row

ROWS = 16


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def wide():
    # so wide that inductor would divide the sum of one row's norm among two threads
    return tiny_model(
        "llama", hidden_size=2048, num_hidden_layers=1, intermediate_size=64, head_dim=64,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip


@torch.no_grad()
def rows_that_differ(model):
    """Of ``ROWS``, how many have another hidden state alone than four at a time."""
    decoder = eepass.transform(model, max_length=64).dense.decoder
    found = []
    for size in (1, 4):
        parts = []
        for begin in range(0, ROWS, size):
            places = [Row(0, at, at) for at in range(begin, begin + size)]
            parts.append(decoder.forward([3 + row.position for row in places], places, 64)[0])
        found.append(torch.cat(parts))
    return int((found[0] != found[1]).any(-1).sum())


def test_a_row_has_the_same_bits_alone_and_with_others(wide, two_threads):
    assert not rows_that_differ(wide)


def test_a_sum_that_threads_share_would_have_others(wide, two_threads, monkeypatch):
    monkeypatch.setitem(SETTINGS, "cpp.min_chunk_size", 512)
    assert rows_that_differ(wide)
