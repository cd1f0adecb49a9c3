"""What ``benchmarks/ablations.py`` compares differs in the technique it names."""

import json
import sys
from types import SimpleNamespace

import pytest
from models import eager_compile
from word_model import save_word_model, write_prompts

import eepass
from benchmarks import ablations
from eepass.early_exit_model import EarlyExitModel
from eepass.model import split_model

LAYERS = 8


def transformed(model, artifact, max_length, stop):
    """As ``eepass.transform``, with nothing compiled."""
    splits, report = split_model(model, max_length, (1, 8))
    artifact = eepass.load_artifact(artifact)
    return EarlyExitModel(splits, report, frozenset(stop), artifact, compiler=eager_compile)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ablations")
    model = save_word_model(folder / "model", num_hidden_layers=LAYERS)
    prompts, found = write_prompts(folder / "prompts.jsonl"), folder / "found.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ablations, "NEW_TOKENS", 24)
        patch.setattr(eepass, "transform", transformed, raising=False)
        patch.setattr(sys, "argv", [
            "ablations.py", str(model), "--artifact", str(model / "eepass"),
            "--prompts", str(prompts), "--limit", "2", "--json", str(found),
        ])  # fmt: skip
        assert ablations.main() == 0
    return json.loads(found.read_text())


def test_every_way_is_measured(report):
    ways = report["ways"]
    asked = {*ablations.one_token_a_pass(0.94), *ablations.draft_tokens_in_a_pass(0.94)}
    assert set(ways) == asked and report["prompts"] == 2 and report["layers"] == LAYERS
    assert all(set(ablations.SHOWN) <= set(own) for own in ways.values())


def test_without_t2_more_predictors_run(report):
    ways = report["ways"]
    for name in ("paper", "here"):
        with_choice, without = ways[name], ways[f"{name}, T2 off"]
        assert with_choice["active_predictors"] < without["active_predictors"]


def test_without_t3_no_layer_is_left_out_and_every_token_is_the_dense_one(report):
    for way in ("tree", "always"):
        off = report["ways"][f"{way}, T3 off"]
        assert off["mean_exit_layer"] == LAYERS and off["agreement"] == 1.0
    assert report["ways"]["always, T3 paper"]["mean_exit_layer"] < LAYERS


def test_a_model_without_exits_is_an_error_of_one_line(tmp_path, monkeypatch, capsys):
    model = save_word_model(tmp_path / "model", artifact=False)
    prompts = write_prompts(tmp_path / "prompts.jsonl")
    arguments = ["ablations.py", str(model), "--prompts", str(prompts)]
    without = SimpleNamespace(has_exits=False)
    monkeypatch.setattr(eepass, "transform", lambda *args, **options: without, raising=False)
    monkeypatch.setattr(sys, "argv", arguments)
    assert ablations.main() == 2
    assert capsys.readouterr().err.strip() == (
        "error: early exits need an artefact with them: eepass train, or --artifact"
    )
