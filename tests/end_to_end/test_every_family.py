"""Every decoder family against its eager model, cut at any layer; and that the checks notice."""

import json
import re
from dataclasses import replace

import pytest
import torch
from families import check
from families import reference as checks
from families.check import SLOTS, check_family
from families.reference import CutModel, dense_error, exit_error, memory_error
from families.run import app
from families.table import FAMILIES, tiny_model
from models import eager_compile
from typer.testing import CliRunner

from eepass.config import ExitConfig
from eepass.errors import EngineError, InputError, PassError
from eepass.masks import causal_mask
from eepass.model import transform
from eepass.passes.pipeline import split_decoder, split_for_rows
from eepass.runtime.decoder.decoder import Decoder
from eepass.runtime.decoder.stepwise import StepwiseDecoder
from eepass.runtime.engine.engine import Engine
from eepass.runtime.engine.options import Options

COMPILED = ("llama", "gemma3", "deepseek_v3", "gpt_oss", "falcon, alibi", "qwen3_next")


@pytest.mark.parametrize("family", check.names())
def test_a_family(family):
    outcome = check_family(family, "graph")
    refused = FAMILIES[family].refused if family in FAMILIES else ""
    assert outcome.status == ("refused" if refused else "ok"), outcome
    assert re.search(refused, outcome.reason)


@pytest.mark.parametrize("family", COMPILED)
def test_a_compiled_family(family):
    outcome = check_family(family, "inductor")
    assert outcome.status == "ok", outcome


def decoder_of(family):
    model = tiny_model(FAMILIES[family])
    split = split_decoder(model, 1, SLOTS)[0]
    return StepwiseDecoder(split, eager_compile), CutModel(model, FAMILIES[family].layers)


@pytest.fixture(scope="module")
def llama_pair():
    return decoder_of("llama")


@pytest.fixture(scope="module")
def hybrid_pair():
    return decoder_of("jamba")


def test_a_reference_cut_elsewhere_is_noticed(llama_pair):
    decoder, reference = llama_pair
    assert exit_error(decoder, reference) < 1e-5

    def deeper(ids, depth):
        return reference(ids, min(depth + 1, decoder.num_layers))

    assert exit_error(decoder, deeper) > 1e-2


@pytest.mark.parametrize("pair", ("llama_pair", "hybrid_pair"))
def test_tokens_left_behind_are_noticed(pair, request, monkeypatch):
    decoder, reference = request.getfixturevalue(pair)
    monkeypatch.setattr(
        checks, "Options", lambda *rest: replace(Options(*rest), kv_policy="propagate")
    )
    assert exit_error(decoder, reference) > 1e-3


def test_a_state_not_written_is_noticed(hybrid_pair, monkeypatch):
    decoder, reference = hybrid_pair
    assert dense_error(decoder, reference) < 1e-5
    name = next(name for name in decoder.kv.states if name.endswith(".1"))
    decoder.kv.allocate(8)
    kept = reference(checks.TEXT, decoder.num_layers)[1]
    decoder.kv.release(0)
    assert decoder.kv.states[name].abs().sum() == 0
    assert memory_error(decoder, kept, len(checks.TEXT)) > 1e-3


def test_recurrent_states_start_anew_and_serve_one_sequence(hybrid_pair):
    decoder, _ = hybrid_pair
    prompt = checks.TEXT[:5]
    first = list(Engine(decoder).generate(prompt, 6))
    list(Engine(decoder).generate([9, 9, 9, 9], 6))
    engine = Engine(decoder)
    assert list(engine.generate(prompt, 6)) == first
    engine.start(prompt, capacity=10)
    with pytest.raises(EngineError, match="no 10 free slots"):
        engine.start(prompt, capacity=10)
    engine.reset()


def test_recurrent_states_take_no_guesses():
    model = transform(tiny_model(FAMILIES["lfm2"]), max_length=64)
    assert model.config == replace(model.config, exits=False, speculate="off")
    said = [step.token for step in model.stream(checks.TEXT[:4], 5)]
    reference = CutModel(tiny_model(FAMILIES["lfm2"]), 3)
    ids = checks.TEXT[:4]
    for token in said:
        assert token == int(reference(ids, 3)[0][-1].argmax())
        ids = [*ids, token]


def test_a_model_that_places_tokens_by_the_cache_is_refused(monkeypatch):
    model = tiny_model(FAMILIES["trocr, decoder"])
    with pytest.raises(PassError, match="does not place tokens"):
        split_decoder(model, 1, SLOTS)
    monkeypatch.setattr("eepass.passes.pipeline.check_trace", lambda *_: None)
    # without the check it would be taken, and be wrong
    assert check_family("trocr, decoder", "graph").status == "failed"


@pytest.fixture(scope="module")
def alibi():
    """A decoder whose mask holds a bias by distance."""
    from models import VOCABULARY

    family = FAMILIES["falcon, alibi"]
    model = tiny_model(replace(family, options={**family.options, "vocab_size": VOCABULARY}))
    splits, _ = split_for_rows(model, 64, (1, 4), 8)
    return Decoder(splits, eager_compile), model


def test_a_tree_with_biases_by_distance(alibi):
    from plain import PlainEngine, RandomDraft

    decoder, model = alibi
    assert not decoder.splits[1].counts_slots
    plain = PlainEngine(model)
    draft = RandomDraft(plain, 3, right=0.7, most=3)
    engine = Engine(decoder, None, None, draft, Options("exact", modes=("speculation",)))
    prompt = [7, 30, 99, 12, 55]
    said = [step.token for step in engine.generate(prompt, 20)]
    assert said == plain.answer(prompt, 20)
    assert engine.statistics.passes < 20


@pytest.mark.parametrize("family", ("bloom", "mpt", "gpt_neo"))
def test_where_slots_are_counted_no_tree_is_drafted(family):
    model = transform(tiny_model(FAMILIES[family]), max_length=64)
    assert model.splits[1].counts_slots
    assert model.config.speculate == "off" and ExitConfig().speculate != "off"


def test_a_window_of_chunks():
    mask = causal_mask(6, 6, -4, torch.float32)[0, 0] == 0
    assert mask[3].tolist() == [True] * 4 + [False] * 2
    assert mask[4].tolist() == [False] * 4 + [True, False]


def test_the_command_writes_its_table(tmp_path):
    file, docs = tmp_path / "out.json", tmp_path / "docs" / "families.md"
    result = CliRunner().invoke(
        app, ["plain torch.nn", "t5", "--json", str(file), "--docs", str(docs)]
    )
    assert result.exit_code == 0, result.output
    found = json.loads(file.read_text())["families"]
    assert found["plain torch.nn"]["status"] == "ok" and found["plain torch.nn"]["layers"] == 3
    assert found["plain torch.nn"]["max_error"] < 1e-5
    assert found["t5"]["status"] == "refused" and "encoder-decoder" in found["t5"]["reason"]
    assert "| t5 | refused |" in docs.read_text()


def test_an_unknown_family_is_named():
    with pytest.raises(InputError, match="unknown family 'llamma'"):
        check.check_families(["llamma"], "graph")
    result = CliRunner().invoke(app, ["--compiler", "gcc"])
    assert result.exit_code == 2
