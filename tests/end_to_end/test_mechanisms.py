"""Each mechanism switched off changes something that is measured."""

from dataclasses import replace

import pytest
from models import random_artifact, tiny_model

from eepass.config import ExitConfig
from eepass.errors import InputError
from eepass.model import transform

PROMPT = list(range(20, 40))
PLAIN = ExitConfig().approximate()


def run(transformed, config, count=40):
    engine = transformed.configure(config)
    steps = list(engine.generate(PROMPT, count))
    return [tuple(step) for step in steps], engine.statistics.summary()


@pytest.fixture(scope="module")
def usual(transformed):
    return run(transformed, PLAIN)


def test_some_tokens_leave_early(usual):
    _, summary = usual
    assert summary["mean_exit_layer"] < 3.9
    assert 0 < summary["false_verify_rate"] < 1


def test_predictors(transformed, usual):
    never, summary = run(transformed, replace(PLAIN, threshold=1.0))
    assert summary["mean_exit_layer"] == 4.0 and summary["active_predictors"] > 0
    always, eager = run(transformed, replace(PLAIN, threshold=0.0))
    assert eager["false_verify_rate"] != usual[1]["false_verify_rate"]
    assert never != usual[0] != always
    dense = [step.token for step in transformed.dense.generate(PROMPT, 40)]
    assert [token for token, _ in never] == dense


def test_translators(transformed, usual):
    assert run(transformed, replace(PLAIN, translators=False))[0] != usual[0]


def test_schedule():
    # deep enough that not every exit is near the last ones
    deep = tiny_model("llama", num_hidden_layers=12)
    transformed = transform(deep, random_artifact(deep), max_length=128)
    scheduled = run(transformed, replace(PLAIN, threshold=0.8))[1]
    everywhere = run(transformed, replace(PLAIN, threshold=0.8, schedule=False))[1]
    assert everywhere["active_predictors"] > scheduled["active_predictors"]


def test_hot_verification(transformed):
    hot = run(transformed, replace(PLAIN, threshold=0.0))[1]
    whole = run(transformed, replace(PLAIN, threshold=0.0, verify="full"))[1]
    # the whole vocabulary has likelier tokens, which no draft can name: fewer are let go
    assert whole["false_verify_rate"] > hot["false_verify_rate"]
    assert whole["mean_exit_layer"] > hot["mean_exit_layer"]


def test_deferral(transformed, usual):
    run(transformed, PLAIN)
    assert transformed.statistics.rows_caught_up > 0
    run(transformed, replace(PLAIN, kv="drop"))
    assert transformed.statistics.rows_caught_up == 0


def test_pending_tokens_are_bounded_by_the_option(transformed):
    run(transformed, replace(PLAIN, pending=0, threshold=0.0))
    assert transformed.statistics.rows_caught_up == 0
    # with nothing allowed to wait, tokens leave before the head alone
    assert transformed.statistics.summary()["mean_exit_layer"] == 4.0


def test_the_papers_preset_is_another_method(transformed, usual):
    steps, _ = run(transformed, replace(ExitConfig.preset("paper"), threshold=0.3))
    assert transformed.plan.verify == "full" and transformed.plan.draft_layer == 0
    assert not any(point.translated for point in transformed.plan.exits)
    assert steps != usual[0]


def test_exits_need_an_artefact(llama, transformed):
    bare = transform(llama, None, max_length=128)
    assert list(bare.generate(PROMPT, 5)[0][:20]) == PROMPT
    with pytest.raises(InputError, match="eepass train"):
        bare.configure(PLAIN)
    with pytest.raises(InputError, match="one prompt at a time"):
        bare.generate([[1, 2], [3, 4]])
    llama.train()
    with pytest.raises(InputError, match="training mode"):
        transform(llama, None)
    llama.eval()
    assert random_artifact(llama).tensors.keys() == transformed.artifact.tensors.keys()
