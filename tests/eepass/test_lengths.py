"""Texts longer than there is room or positions for are refused, at every door, before decoding."""

from types import SimpleNamespace

import pytest
import torch
from models import tiny_model

import eepass
from eepass.benchmark.frontier import by_position
from eepass.cli.console import LiveAnswer
from eepass.errors import InputError
from eepass.hf.prepared import refuse_length
from eepass.passes.trace.decode_step import known_positions
from eepass.runtime.engine.batch import Request, decode_batch
from eepass.runtime.engine.sequence import DecodedToken
from eepass.runtime.sampling import Sampling


def test_what_a_model_knows():
    assert known_positions(tiny_model("llama")) == 512
    assert known_positions(tiny_model("gpt2", n_positions=48)) == 48
    for config, known in (
        ({}, None),
        ({"max_seq_len": 64}, 64),
        ({"max_position_embeddings": 64, "rope_parameters": {"rope_type": "yarn"}}, 64),
        (
            {
                "max_position_embeddings": 64,
                "rope_parameters": {
                    "full": {"rope_type": "longrope", "original_max_position_embeddings": 32}
                },
            },
            32,
        ),
    ):
        text = SimpleNamespace(**config)
        text.get_text_config = lambda decoder, text=text: text
        assert known_positions(SimpleNamespace(config=text)) == known


def test_more_than_the_model_knows(llama):
    with pytest.raises(InputError, match=r"max_length=600.*knows 512 positions"):
        eepass.transform(llama, max_length=600)
    model = tiny_model("llama")
    model.generation_config.eos_token_id = None
    ids = torch.tensor([[5, 9, 44]])
    with pytest.raises(InputError, match=r"513 tokens.*knows 512 positions"):
        model.generate(ids, custom_generate=eepass.generate, max_new_tokens=510)
    with pytest.raises(InputError, match="knows 512 positions"):
        eepass.prepare(model, max_length=600)
    with pytest.raises(InputError, match="knows 512 positions"):
        refuse_length(model, 513)


def test_more_than_the_cache_was_made_for(transformed):
    prompt = [5] * 120
    with pytest.raises(InputError, match=r"120 tokens of prompt and up to 9 of answer.*128"):
        transformed.generate([prompt], max_new_tokens=9)
    assert transformed.generate([prompt], max_new_tokens=8).shape == (1, 128)
    with pytest.raises(
        ValueError, match=r"140 tokens.*are asked for, and a sequence may have at most"
    ):
        list(decode_batch(transformed.dense, [Request(prompt, 20, frozenset(), Sampling())]))


def test_agreement_by_position():
    steps = [DecodedToken(7, 10) for _ in range(40)]
    dense = [7] * 20 + [8] * 20
    found = by_position([(steps, dense), ([DecodedToken(7, 4)] * 3, [7] * 3)])
    assert [(s["first"], s["last"], s["tokens"]) for s in found] == [
        (2, 15, 17), (16, 31, 16), (32, 63, 10),
    ]  # fmt: skip
    assert [s["agreement"] for s in found] == [1.0, 6 / 16, 0.0]
    assert found[0]["mean_exit_layer"] == pytest.approx((14 * 10 + 3 * 4) / 17)


def test_text_is_shown_as_it_comes_without_decoding_all_of_it_again():
    asked = []

    def decode(ids):
        asked.append(len(ids))
        return bytes(ids).decode("utf-8", errors="replace")

    show = LiveAnswer(decode, 30, "title")
    show.live = SimpleNamespace(update=lambda text: None)
    said = "naïve «Ελλάδα» 你好 " * 20
    for byte in said.encode():
        show.add(byte, 30)
    assert show.text.plain == said
    assert max(asked) < 8


def test_slots_on_a_gpu_come_in_whole_tiles(llama, monkeypatch):
    """cuDNN's attention under a mask takes keys in tiles of 128; behind the text there is room for
    the smallest chunk of a prompt, of 256 rows there and of 64 on a CPU."""
    from eepass import model

    on = {"type": "cpu"}
    device = type("Device", (), {"type": property(lambda self: on["type"])})()
    monkeypatch.setattr(torch.Tensor, "device", device)
    assert [model._slots(llama, length) for length in (60, 64, 128, 500)] == [128, 128, 192, 576]
    on["type"] = "cuda"
    assert [model._slots(llama, length) for length in (60, 64, 128, 500)] == [384, 384, 384, 768]
