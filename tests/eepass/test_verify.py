"""A certificate says exact where everything is, and notices what is not."""

import json

import pytest
from command_line import refused, run
from models import VOCABULARY, random_artifact, tiny_model
from word_model import save_word_model, write_prompts

import eepass
from eepass.checkpoints.models import LoadedModel
from eepass.exactness.certificate import verify
from eepass.runtime.cache.kv_cache import KvCache
from eepass.runtime.engine.verifier import Verifier


@pytest.fixture(scope="module")
def loaded():
    return LoadedModel("tiny", tiny_model("llama"), None, None)


@pytest.fixture(scope="module")
def ready(loaded):
    artifact = random_artifact(loaded.model)
    return eepass.transform(loaded.model, artifact, max_length=512)


PROMPTS = [[(7 * n + 3 * k) % (VOCABULARY - 1) for k in range(4 + n)] for n in range(5)]
# what repeats is drafted
PROMPTS = [ids * 3 for ids in PROMPTS]


def ways(found):
    return {way["way"]: way for way in found["ways"]}


def test_the_command_gives_a_certificate(tmp_path):
    folder = save_word_model(tmp_path / "model")
    file = tmp_path / "found.json"
    usual = ("verify", folder, "--dtype", "fp32", "--prompts", write_prompts(tmp_path / "p.jsonl"))
    code, text, errors = run(*usual, "--limit", 5, "--new-tokens", 10, "--json", file)
    assert code == 0, errors
    found = json.loads(file.read_text())
    assert found["exact"] and found["bits"] and found["prompts"] == 5
    assert f"exact: {sum(way['tokens'] for way in found['ways'])} tokens" in " ".join(text.split())
    assert "no prompt fits" in refused(*usual, "--new-tokens", 100_000)


def test_every_mechanism_was_at_work(loaded, ready):
    before = ready.config
    found = verify(loaded, ready, PROMPTS, 16)
    assert ready.config is before
    assert found["exact"] and not any(way["bits_different"] for way in found["ways"])
    by_name = ways(found)
    assert by_name["dense, once more"]["accepted_per_pass"] == 1
    assert by_name["drafts of the text"]["accepted_per_pass"] > 1
    assert by_name["exits"]["mean_exit_layer"] < 4
    assert by_name["exits"]["rollbacks"] > 0
    # several sequences took part in a pass
    assert by_name["dense, 5 together"]["accepted_per_pass"] > 2
    assert all(way["answers"] == len(PROMPTS) for way in found["ways"])


def test_accepting_what_was_not_verified_is_noticed(loaded, ready, monkeypatch):
    def first_child(self, scheduled, node, position, logits):
        children = scheduled.tree.children(node)
        return next((c for c in children if (scheduled, c, position) in logits), None)

    monkeypatch.setattr(Verifier, "_accepted_child", first_child)
    found = verify(loaded, ready, PROMPTS, 16)
    by_name = ways(found)
    assert not found["exact"] and by_name["drafts of the text"]["different"]
    first = by_name["drafts of the text"]["first_difference"]
    assert first["dense"] != first["found"]
    assert not by_name["dense, once more"]["different"]


def test_keys_left_where_a_tree_had_them_are_noticed(loaded, ready, monkeypatch):
    monkeypatch.setattr(KvCache, "move", lambda *arguments: None)
    found = verify(loaded, ready, PROMPTS, 48)
    assert not found["exact"]
    wrong = [way for way in found["ways"] if way["different"] or way["bits_different"]]
    assert wrong and all("draft" in way["way"] for way in wrong)


def test_a_row_that_depends_on_others_is_noticed(loaded, ready, monkeypatch):
    from eepass.runtime.decoder.decoder import Decoder

    logits = Decoder.logits

    def leaking(self, hidden):
        # too little to change a token
        return logits(self, hidden) * (1 + 1e-6 * (hidden.shape[1] - 1))

    monkeypatch.setattr(Decoder, "logits", leaking)
    found = verify(loaded, ready, PROMPTS, 16)
    assert not found["exact"]
    together = ways(found)["dense, 5 together"]
    assert together["bits_different"] and "token" in together["first_difference"]
    assert not ways(found)["dense, once more"]["bits_different"]
