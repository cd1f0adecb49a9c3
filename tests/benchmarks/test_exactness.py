"""Answers that change are counted, and where they do so first."""

import sys
from copy import deepcopy
from pathlib import Path

import pytest
from models import random_artifact, tiny_model, tiny_tokenizer

from benchmarks.answers import Answers, eepass_answers, transformers_answers
from benchmarks.exactness import _add_to, compared
from benchmarks.vllm_answers import vllm_answers
from eepass.checkpoints.models import LoadedModel
from eepass.errors import InputError

PROMPTS = [[5, 9, 40, 7] * 3, [11, 12, 13], [30, 31, 30, 31, 30]]


def test_what_changes_is_counted():
    ways = {
        "alone": Answers([[1, 2, 3], [4, 5]], passes=5),
        "together": Answers([[1, 2, 3], [4, 6]]),
        "drafts": Answers([[1, 2], [4, 5]], passes=2),
    }
    said = []
    alone, together, drafts = compared(iter(ways.items()), said.append)
    assert alone["different"] == 0 and alone["tokens_per_pass"] == 1
    assert together["different"] == 1 and together["differences"] == [{"prompt": 1, "token": 1}]
    assert together["tokens_per_pass"] is None
    # one that ends earlier is another
    assert drafts["differences"] == [{"prompt": 0, "token": 2}]
    assert said[-1] == "drafts: 1 of 2 answers change"


def test_an_engine_is_added_to_what_was_found_with_the_same_work():
    about = {"model": "tiny", "count": 3}
    before = {**about, "versions": {"a": "1"}, "skipped": {}, "engines": {"one": [1]}}
    found = {**about, "versions": {"b": "2"}, "skipped": {}, "engines": {}}
    _add_to(found, deepcopy(before), Path("a.json"))
    assert found["engines"] == {"one": [1]} and found["versions"] == {"a": "1", "b": "2"}
    with pytest.raises(InputError, match=r"a\.json: of another model"):
        _add_to({**found, "count": 4}, before, Path("a.json"))


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    model = tiny_model("llama", eos_token_id=2)
    folder = tmp_path_factory.mktemp("artifact")
    random_artifact(model).save(folder)
    return LoadedModel("tiny", model, tiny_tokenizer(), folder)


def test_ways_of_eepass_and_of_transformers(loaded):
    found = {}
    for answers in (transformers_answers, eepass_answers):
        ways = dict(answers(loaded, PROMPTS, 24))
        found[answers] = ways
        assert all(len(way.tokens) == len(PROMPTS) for way in ways.values())
        assert all(0 < len(answer) <= 24 for way in ways.values() for answer in way.tokens)
    theirs, ours = found.values()
    # in float32 and without kernels that sum otherwise there is nothing to change
    (expected,) = {str(way.tokens) for way in ours.values()}
    assert str(theirs["greedy, alone"].tokens) == expected
    for way in ("drafts of the text", "drafts, exits, 8 together, beginnings kept"):
        assert ours[way].passes < ours["dense, alone"].passes
    tokens = sum(map(len, theirs["greedy, alone"].tokens))
    assert theirs["greedy, alone"].passes == tokens > theirs["prompt look-up"].passes
    assert theirs["8 together, padded"].passes < tokens / 2


FAKE = """#!{python}
import json, os, sys
task = json.load(open(sys.argv[2]))
assert os.path.isfile(task["model"] + "/config.json")
ways = {{("drafts" if task["drafting"] else "alone"): [ids[:task["new_tokens"]]
        for ids in task["prompts"]]}}
json.dump({{"versions": {{"vllm": "0"}}, "ways": ways}}, open(task["out"], "w"))
"""


def test_vllm_answers_in_its_own_process(loaded, tmp_path):
    fake = tmp_path / "python"
    fake.write_text(FAKE.format(python=sys.executable))
    fake.chmod(0o755)
    versions = {}
    ways = dict(vllm_answers(fake, loaded, PROMPTS, 3, versions))
    assert ways.keys() == {"alone", "drafts"} and versions == {"vllm": "0"}
    assert ways["drafts"].tokens == [ids[:3] for ids in PROMPTS]
    with pytest.raises(InputError, match="no vLLM at None: --vllm PYTHON"):
        next(vllm_answers(None, loaded, PROMPTS, 3, versions))
    fake.write_text("#!/bin/false\n")
    with pytest.raises(InputError, match="ended with status 1"):
        next(vllm_answers(fake, loaded, PROMPTS, 3, versions))
