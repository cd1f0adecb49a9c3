"""An exported head in vLLM: what is asked of it, and what is made of its answers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import AsTraced
from word_model import save_word_model

from eepass.errors import InputError
from tools import vllm_draft

FAKE = """#!{python}
import json, os, sys
assert sys.argv[1:3] == [{file!r}, "--task"]
task = json.load(open(sys.argv[3]))
assert os.path.isfile(task["model"] + "/config.json")
drafts = task.get("drafts")
answers = [ids[:3] for ids in task["prompts"]]
if drafts and drafts["method"] == "eagle3":
    config = json.load(open(drafts["model"] + "/config.json"))
    assert config["draft_vocab_size"] and drafts["num_speculative_tokens"] == 2
    answers[0][1] = 1
if drafts and drafts["method"] == "custom_class":
    from eepass.drafts.vllm_suffix import SuffixDrafts
    assert drafts["model"] == f"{{SuffixDrafts.__module__}}.{{SuffixDrafts.__name__}}"
    answers[1][2] = 1
counters = {{"passes": 10, "drafted": 20, "accepted": 5, "accepted_by_position": [4, 1]}}
json.dump({{"versions": {{"vllm": "0"}}, "counters": counters,
           "answers": [answers] * task.get("rounds", 1),
           "gaps": [[0.5, 0.25, 0.125] for _ in answers]}}, open(task["out"], "w"))
"""


@pytest.fixture
def fake(tmp_path):
    made = tmp_path / "python"
    made.write_text(FAKE.format(python=sys.executable, file=vllm_draft.__file__))
    made.chmod(0o755)
    return made


def test_answers_are_compared_with_and_without_the_head(tmp_path, fake, monkeypatch):
    monkeypatch.setattr("eepass.early_exit_model._cpu_compiler", AsTraced)
    torch.use_deterministic_algorithms(False)
    folder = save_word_model(tmp_path / "model")
    found = vllm_draft.compare(fake, str(folder), None, "eagle3", 2, 8, 2)
    assert found["answers"] == 2 and found["draft_tokens"] == 2
    assert found["differ_with_head"] == 1 and found["gaps_where_they_differ"] == [0.25]
    assert found["differ_once_more"] == found["differ_with_ngram_drafts"] == 0
    assert found["differ_with_suffix_drafts"] == 1
    assert found["vllm"]["tokens_a_pass"] == 1.5
    assert found["vllm_suffix_drafts"] == found["vllm_ngram_drafts"] != {}
    ours = found["eepass"]
    assert 1 <= ours["tokens_a_pass"] <= 3 and ours["passes"] <= 14
    along = found["eepass_along_vllm"]
    # the fake's answers have three tokens
    assert 1 <= along["passes"] <= 4 and len(along["accepted_by_position"]) == 2
    assert found["vllm_to_eepass"] == 1.5 / ours["tokens_a_pass"]
    with pytest.raises(InputError, match=r"no vLLM at .*none"):
        vllm_draft.compare(tmp_path / "none", str(folder), None, "eagle3", 1, 8, 2)
    fake.write_text("#!/bin/false\n")
    with pytest.raises(InputError, match="ended with status 1"):
        vllm_draft.compare(fake, str(folder), None, "eagle3", 1, 8, 2)


@pytest.mark.slow
@pytest.mark.parametrize("form", ("eagle3", "speculators"))
def test_smollm2_drafts_in_vllm_as_it_does_here(tmp_path, form):
    """``VLLM_PYTHON``: the Python of an environment that has vLLM."""
    python = os.environ.get("VLLM_PYTHON")
    if python is None:
        pytest.skip("VLLM_PYTHON is not set")
    out = tmp_path / "found.json"
    script = Path(vllm_draft.__file__)
    subprocess.run(
        [sys.executable, str(script), "--vllm", python, "--format", form, "--json", str(out)],
        check=True,
    )
    found = json.loads(out.read_text())
    assert 0.9 < found["vllm_to_eepass"] < 1.1
    assert 0.95 < found["vllm_to_eepass_along"] < 1.05
    assert found["differ_once_more"] == 0
    # a bfloat16 logit of SmolLM2's size has steps of an eighth
    assert max(found["gaps_where_they_differ"], default=0) <= 0.25
