"""Layers are found by structure; what is not a stack of layers is refused with the reason."""

import pytest
import torch
from models import FAMILIES, tiny_model
from torch import nn

from eepass.errors import PassError
from eepass.masks import causal_mask
from eepass.passes.pipeline import SPLIT, TRACED
from eepass.passes.report import PassReport
from eepass.passes.runner import PassRunner
from eepass.passes.split.find_layers import find_layers
from eepass.passes.split.split_segments import split_segments
from eepass.passes.trace.capture import KvSlots, capture
from eepass.passes.trace.decode_step import trace_decode_step

ROWS, SLOTS, WIDTH = 2, 24, 16


class PlainBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.inner, self.outer = nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x, mask, slots):
        q, k, v = self.mix(self.first(x)).chunk(3, -1)
        at = torch.arange(x.shape[1]) + slots.start
        keys = slots.keys.index_copy_(2, at, k[:, None])
        values = slots.values.index_copy_(2, at, v[:, None])
        mixed = nn.functional.scaled_dot_product_attention(q[:, None], keys, values, mask)
        x = x + self.out(mixed[:, 0])
        return x + self.outer(nn.functional.gelu(self.inner(self.second(x))))


class PlainGpt(nn.Module):
    """A decoder that is not from transformers, its modules named without meaning."""

    def __init__(self, depth=3, leak=False):
        super().__init__()
        self.a, self.b = nn.Embedding(50, WIDTH), nn.Linear(WIDTH, 50, bias=False)
        self.c = nn.ModuleList(PlainBlock() for _ in range(depth))
        self.leak = leak
        self.slots = [
            KvSlots(
                torch.zeros(1, 1, SLOTS, WIDTH), torch.zeros(1, 1, SLOTS, WIDTH), torch.tensor(0)
            )
            for _ in range(depth)
        ]

    def forward(self, ids, positions, masks):
        x = self.a(ids) + positions[..., None] * 0.01
        kept = None
        for index, block in enumerate(self.c):
            x = block(x, masks["attention"], self.slots[index])
            if index == 0 and self.leak:
                kept = torch.tanh(block.inner(x))
        return self.b(x + kept.mean() if self.leak else x)


def traced(model):
    ids, positions = torch.zeros(1, ROWS, dtype=torch.long), torch.arange(ROWS)[None]
    masks = {"attention": causal_mask(ROWS, SLOTS, None, torch.float32)}
    decoder = capture(
        model,
        ids,
        positions,
        masks,
        dict(model.named_parameters()),
        model.slots,
        {"attention": None},
    )
    return PassRunner(PassReport()).run(decoder, TRACED)


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family):
    decoder = PassRunner(PassReport()).run(trace_decode_step(tiny_model(family), 1, 32), TRACED)
    report = PassReport()
    found = find_layers(decoder, report)
    assert len(found.hidden_states) == 5 and report.rewritten == 4
    split = PassRunner(report).run(decoder, SPLIT)
    assert split.distinct_layers == 1
    for number, layer in enumerate(split.layers):
        roles = {role.layer for role in layer.inputs if role.kind in ("keys", "values", "slots")}
        assert roles == {number}
        names = [role.name for role in layer.inputs if role.kind == "parameter"]
        assert names and all(f".{number}." in name for name in names)


def test_a_decoder_without_telling_names():
    split = PassRunner(PassReport()).run(traced(PlainGpt()), SPLIT)
    assert (len(split.layers), split.distinct_layers) == (3, 1)
    assert split.head.weight == "b.weight"


def test_a_layer_that_reads_more_than_the_hidden_state_is_refused():
    # a value of the first layer goes round all the others
    decoder = traced(PlainGpt(leak=True))
    with pytest.raises(PassError, match=r"besides the hidden state|do not follow one another"):
        split_segments(find_layers(decoder, PassReport()), PassReport())


def test_a_graph_without_a_cache_is_refused():
    with pytest.raises(PassError, match="no layer writes keys and values"):
        find_layers(traced_without_cache(), PassReport())


def traced_without_cache():
    table, head = torch.randn(50, WIDTH), torch.randn(50, WIDTH)

    def step(ids, positions, masks):
        return nn.functional.embedding(ids, table) @ head.T + masks["attention"].sum()

    ids, positions = torch.zeros(1, ROWS, dtype=torch.long), torch.arange(ROWS)[None]
    masks = {"attention": causal_mask(ROWS, SLOTS, None, torch.float32)}
    return capture(step, ids, positions, masks, {}, [], {"attention": None})
