"""What rows.py reports, from systems whose times are known, and what a pass of eepass is."""

import json
import sys

import gguf
import numpy as np
import pytest
from models import eager_compile, tiny_model

from benchmarks import attention, row_times, rows
from eepass.early_exit_model import EarlyExitModel
from eepass.errors import InputError
from eepass.model import split_model
from eepass.ops.rows import attend_rows


class Known:
    """A system of known times; ``log`` has what was asked of it."""

    def __init__(self, name, first, each, log):
        self.name, self.first, self.each, self.log = name, first, each, log

    def passes(self, rows, count):
        self.log.append((self.name, rows))
        # the first pass of a block is slow: it must not count
        return [1.0] + [self.first + self.each * rows] * (count - 1)

    def prefill(self, tokens):
        return tokens * self.each


@pytest.fixture
def known(monkeypatch):
    monkeypatch.setattr(row_times, "PAUSE", 0)
    log = []
    return {
        "eepass": Known("eepass", 0.009, 0.001, log),
        "llama.cpp": Known("llama.cpp", 0.0, 0.02, log),
    }, log


def test_systems_and_memory_are_measured_in_turns(known):
    systems, log = known
    rates = iter(range(10, 100))

    def stream():
        log.append("stream")
        return next(rates)

    times, streams = row_times.measure_passes(systems, stream, (1, 4), 3)
    turn = [("eepass", 1), "stream", ("llama.cpp", 1), ("eepass", 4), "stream", ("llama.cpp", 4)]
    assert log[4:] == 3 * turn
    assert times["eepass"] == {1: [pytest.approx(0.01)] * 3, 4: [pytest.approx(0.013)] * 3}
    assert streams == {1: [10, 12, 14], 4: [11, 13, 15]}


def test_figures_are_medians_and_ratios_those_of_one_round():
    times = {
        "eepass": {1: [0.010, 0.020, 0.040], 4: [0.012, 0.030, 0.044]},
        "llama.cpp": {1: [0.020, 0.020, 0.020], 4: [0.060, 0.060, 0.060]},
    }
    streams = {1: [50.0, 25.0, 12.5], 4: [50.0, 25.0, 12.5]}
    prompts = {"eepass": {512: [1.0, 2.0, 4.0]}, "llama.cpp": {512: [2.0, 4.0, 8.0]}}
    found = row_times.figures_of(times, streams, prompts, {"roofline_fraction": 400_000_000})
    assert found["pass_ms"]["eepass"] == {"1": 20.0, "4": 30.0}
    assert found["stream_gb_s"] == 25.0
    # memory and passes slowed down together, which the fraction does not show
    assert found["roofline_fraction"]["1"] == 0.8
    assert found["spread"]["roofline_fraction"]["1"] == [0.8, 0.8]
    assert found["rows_over_one"]["eepass"] == {"4": 1.2}
    assert found["rows_over_one"]["llama.cpp"] == {"4": 3.0}
    assert found["of_llama_cpp"] == {"1": 1.0, "4": 0.5}
    assert found["prefill_tokens_per_s"]["eepass"] == {"512": 256.0}
    assert found["prefill_over_llama_cpp"] == {"512": 2.0}
    assert found["spread"]["pass_ms"]["eepass"]["1"] == [10.0, 40.0]


def test_the_report_has_the_fields_that_are_documented(known, monkeypatch, tmp_path):
    class Memory:
        def gb_s(self, readings):
            return 50.0

    about = {
        "model": "known", "weights": "", "dtype": "bfloat16", "isa": "avx512", "threads": 2,
        "longest": 1000, "bytes_a_pass": 250_000_000, "file_bytes_a_pass": 125_000_000,
    }  # fmt: skip
    monkeypatch.setattr(rows, "StreamBuffer", Memory)
    monkeypatch.setattr(rows, "prepare", lambda options: (known[0], about))
    file = tmp_path / "a.json"
    monkeypatch.setattr(sys, "argv", ["rows.py", "known", "--rounds", "2", "--json", str(file)])
    rows.main()
    found = json.loads(file.read_text())
    assert about.items() <= found.items()
    counts = [str(count) for count in (1, 2, 4, 8, 16)]
    for name in ("eepass", "llama.cpp"):
        assert list(found["pass_ms"][name]) == counts
        assert list(found["rows_over_one"][name]) == counts[1:]
        # what is longer than the model takes is left out
        assert list(found["prefill_tokens_per_s"][name]) == ["512"]
    assert found["roofline_fraction"]["1"] == 0.5
    assert found["roofline_fraction_of_file"]["1"] == 0.25
    assert found["spread"].keys() == found.keys() - about.keys() - {"rounds", "spread"}


def transformed(**changes):
    splits, report = split_model(tiny_model(**changes), 256, (1, 4))
    return EarlyExitModel(splits, report, frozenset(), None, compiler=eager_compile)


@pytest.mark.parametrize("tied", [False, True])
def test_bytes_a_pass_are_those_of_layers_and_head(tied):
    model = tiny_model(tie_word_embeddings=tied)
    (split, _) = split_model(model, 64, (1,))[0].values()
    embedding = model.get_input_embeddings().weight
    whole = sum(parameter.nbytes for parameter in model.parameters())
    assert split.bytes_a_pass >= whole - (0 if tied else embedding.nbytes)
    # rotary embeddings may be among them
    assert split.bytes_a_pass - (whole - (0 if tied else embedding.nbytes)) < 1024


def test_a_pass_is_whole(monkeypatch):
    model = transformed()
    system, seen = rows.Eepass(model), []
    logits = model.decoder.logits
    monkeypatch.setattr(
        model.decoder, "logits", lambda hidden: seen.append(logits(hidden)) or seen[-1]
    )
    times = system.passes(4, 2)
    assert len(times) == 2 and min(times) > 0
    assert [tuple(found.shape) for found in seen] == [(1, 4, 160)] * 2
    assert system.prefill(100) > 0 and model.decoder.kv.unused


def test_file_bytes_leave_out_an_embedding_that_is_not_the_head(tmp_path):
    def written(*names):
        file = tmp_path / "model.gguf"
        writer = gguf.GGUFWriter(str(file), "llama")
        for name in names:
            writer.add_tensor(name, np.zeros((8, 32), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return rows.file_bytes_a_pass(file)

    assert written("token_embd.weight", "blk.0.attn_q.weight") == 2 * 8 * 32 * 4
    assert written("token_embd.weight", "output.weight") == 8 * 32 * 4


def test_an_unknown_instruction_set_is_refused():
    with pytest.raises(InputError, match="avx3"):
        rows.chosen_isa("avx3")


def test_attention_of_one_token_reads_the_keys_and_values_that_are_counted():
    shape = attention.Shape(layers=2, heads=4, groups=2, channels=16)
    tokens = 40
    one = attention.Attention(shape, tokens)
    read = [part[:, :tokens] for pair in one.caches for part in pair]
    assert sum(part.nbytes for part in read) == shape.bytes_a_token(tokens)
    found = one.run()
    assert len(found) == 2
    for (keys, values), own in zip(one.caches, found, strict=True):
        # what lies behind the text is not attended to
        mask = one.mask[:, :tokens]
        expected = attend_rows(one.query, keys[:, :tokens], values[:, :tokens], mask, 0.25)
        assert (own - expected).abs().max() < 2e-2
    assert one.seconds(2) > 0
