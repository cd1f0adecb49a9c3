"""A transformed folder holds code for whatever any number of sequences can ask for (slow)."""

import pytest
import torch
from word_model import save_word_model

import eepass
from eepass.bundle.write import write_folder
from eepass.config import ExitConfig
from eepass.runtime.engine.batch import Request, decode_batch
from eepass.runtime.sampling import GREEDY

pytestmark = pytest.mark.slow
PROMPTS = [[5 + n, 9, 44 + 2 * n, 7, 8 * n + 3] for n in range(12)]
CONFIGS = {
    "approximate": ExitConfig(threshold=0.3).approximate(),
    "exits and drafts": ExitConfig(adaptive=False, threshold=0.3),
    "propagate": ExitConfig(
        kv="propagate", guarantee="approximate", speculate="off", adaptive=False, threshold=0.3
    ),
    "paper": ExitConfig.preset("paper"),
    "exact": ExitConfig(),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.use_deterministic_algorithms(False)
    original = save_word_model(tmp_path_factory.mktemp("model"))
    path = tmp_path_factory.mktemp("out") / "folder"
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("config")))
        loaded = eepass.load(str(original), "fp32")
        write_folder(loaded, path, loaded.artifact, max_length=192)
        yield eepass.load(str(path))


@pytest.mark.parametrize("name", CONFIGS)
def test_any_number_of_sequences_is_answered(folder, name):
    torch.use_deterministic_algorithms(False)
    engine = folder.model.configure(CONFIGS[name])
    for count in range(1, 13):
        requests = [Request(prompt, 6, frozenset(), GREEDY) for prompt in PROMPTS[:count]]
        assert len(list(decode_batch(engine, requests))) == 6 * count
