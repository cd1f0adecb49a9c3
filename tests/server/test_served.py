"""What can be served: any model, a prepared one as it is, a transformed one; and how."""

import asyncio
import socket
from dataclasses import replace

import pytest
import torch
from models import random_artifact, tiny_model, tiny_tokenizer

import eepass
from eepass.checkpoints.models import LoadedModel
from eepass.config import ExitConfig
from eepass.errors import InputError
from eepass.hf.prepared import in_use
from eepass.runtime.engine.engine import Engine
from eepass.server.running import openai_app


@pytest.fixture
def model(traced):
    found = tiny_model("llama", num_hidden_layers=2)
    found.generation_config.update(eos_token_id=None, pad_token_id=0)
    return found


def test_a_model_is_transformed_with_room_for_many(start, model, says):
    api = start(LoadedModel("tiny", model, tiny_tokenizer(), None), cache_tokens=256)
    assert api.said() == says(12) and 256 <= api.metric("eepass_cache_slots") < 400
    # the model itself is as it was
    assert "generate" not in vars(model)
    # no more than it knows positions for
    api = start(LoadedModel("tiny", model, tiny_tokenizer(), None), warm_up=True)
    assert api.metric("eepass_cache_slots") < 600 and api.said() == says(12)


def test_a_prepared_model_is_looked_at_before_each_request(start, model, says):
    eepass.prepare(model, None, ExitConfig(adaptive=False, exits=False), max_length=128)
    api = start(LoadedModel("tiny", model, tiny_tokenizer(), None))
    assert api.said() == says(12)
    with in_use(model, 1) as transformed:
        # its engine decodes, and no draft repeats another's request
        assert transformed.statistics.passes > 0 and not transformed.config.remember
    assert api.metric('eepass_mode{mode="speculation"}') == 1
    assert api.refused(max_tokens=200)[0] == 400
    with torch.no_grad():
        model.lm_head.weight[5] = 4 * model.lm_head.weight.abs().max()
    assert api.said() != says(12)
    ids = torch.tensor([tiny_tokenizer()("hello_")["input_ids"]])
    now = model.generate(ids, max_new_tokens=12, do_sample=False, custom_generate=None)
    assert api.said() == tiny_tokenizer().decode(now[0, ids.shape[1] :])


def test_a_model_that_cannot_be_followed_is_told_of_in_the_log(start, model, caplog):
    eepass.prepare(model, None, max_length=128)
    api = start(LoadedModel("tiny", model, tiny_tokenizer(), None))
    model.train()
    status, error = api.refused()
    assert status == 500 and "training" not in error["message"]
    assert "the model is in training mode" in caplog.text
    model.eval()
    assert api.chat()[0] == 200


def test_requests_may_be_remembered_where_that_is_asked_for(start, model):
    eepass.prepare(model, max_length=128)
    start(LoadedModel("tiny", model, tiny_tokenizer(), None), remember=True)
    with in_use(model, 1) as transformed:
        assert transformed.config.remember
    with pytest.raises(InputError, match="dense: this model decodes as"):
        start(LoadedModel("tiny", model, tiny_tokenizer(), None), dense=True)


def test_an_approximate_model_refuses_what_wants_all_logits(start, model):
    config = ExitConfig().approximate()
    eepass.prepare(model, random_artifact(model), config, max_length=128)
    api = start(LoadedModel("tiny", model, tiny_tokenizer(), None))
    assert api.chat()[0] == 200
    for fields in ({"logprobs": True}, {"logit_bias": {"5": 1}}, {"presence_penalty": 1}):
        status, error = api.refused(**fields)
        assert (status, error["param"]) == (400, next(iter(fields)))
        assert "guarantee='exact'" in error["message"]


def test_dense_where_that_is_asked_for(start, says):
    api = start(dense=True)
    assert api.said(max_tokens=40) == says(40)
    assert api.metric("eepass_tokens_per_pass") <= 1 and api.metric('eepass_mode{mode="dense"}')


def test_a_model_without_a_chat_template(start, loaded, says):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    api = start(replace(loaded, tokenizer=tokenizer))
    status, error = api.refused()
    assert status == 400 and "/v1/completions" in error["message"]
    assert api.post("/v1/completions", {"prompt": "hello_", "max_tokens": 3})[0] == 200


def test_a_template_that_refuses(start, loaded, says):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    status, error = start(replace(loaded, tokenizer=tokenizer)).refused()
    assert status == 400 and "roles must alternate" in error["message"]


def test_an_address_that_is_taken(start, loaded):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=rf"cannot listen at 127\.0\.0\.1:{port}.*port="):
            eepass.serve(loaded, port=port)
    with pytest.raises(InputError, match=r"cannot listen at nowhere\.invalid"):
        eepass.serve(loaded, host="nowhere.invalid")


def test_an_application_for_other_servers_tells_whether_it_decodes(loaded, monkeypatch):
    app = openai_app(loaded, warm_up=False)
    asyncio.run(app.check())
    monkeypatch.setattr(Engine, "run_prompt", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        asyncio.run(app.check())
