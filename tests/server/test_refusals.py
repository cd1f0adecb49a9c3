"""What is refused: with a status, in one shape, by name, and without harm to others."""

import pytest
from api import CHAT

BAD = [
    ({"n": 17}, "n", "16"),
    ({"n": 0}, "n", "1"),
    ({"n": True}, "n", "integer"),
    ({"top_logprobs": 3}, "top_logprobs", "logprobs=true"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "20"),
    ({"logprobs": 1}, "logprobs", "boolean"),
    ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
    ({"tools": [{"type": "function"}]}, "tools", "not supported"),
    ({"tool_choice": "required"}, "tool_choice", "not supported"),
    ({"functions": [{}]}, "functions", "not supported"),
    ({"presence_penalty": 2.5}, "presence_penalty", "2"),
    ({"frequency_penalty": "1"}, "frequency_penalty", "number"),
    ({"logit_bias": {"160": 1}}, "logit_bias", "0 to 159"),
    ({"logit_bias": {"-1": 1}}, "logit_bias", "0 to 159"),
    ({"logit_bias": {"5": 101}}, "logit_bias", "100"),
    ({"messages": []}, "messages", "empty"),
    ({"messages": None}, "messages", "list"),
    ({"messages": "hello"}, "messages", "list"),
    ({"messages": [{"role": "user", "content": "  "}]}, "messages", "no text"),
    ({"messages": [{"content": "no role"}]}, "messages.0.role", "missing"),
    ({"messages": [*CHAT, {"role": "user"}]}, "messages.1.content", "missing"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content", "string"),
    ({"messages": [{"role": "user", "content": [{"text": "a"}]}]}, "messages.0.content", "parts"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages.0.content",
        "no other parts",
    ),
    ({"messages": [{"role": "tool", "content": "a"}]}, "messages.0.role", "user"),
    ({"messages": [{**CHAT[0], "tool_calls": [{}]}]}, "messages.0.tool_calls", "leave it out"),
    ({"max_tokens": 0}, "max_tokens", "1"),
    ({"max_tokens": -5}, "max_tokens", "1"),
    ({"max_tokens": 12.0}, "max_tokens", "integer"),
    ({"max_tokens": True}, "max_tokens", "integer"),
    ({"max_tokens": "12"}, "max_tokens", "integer"),
    ({"max_tokens": 10**40}, "max_tokens", ""),
    ({"max_tokens": 507}, "max_tokens", "room for 506"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "differs"),
    ({"temperature": -1}, "temperature", "0"),
    ({"temperature": 2.1}, "temperature", "2"),
    ({"temperature": 1e-7}, "temperature", "1e-05"),
    ({"top_p": 1.5}, "top_p", "1"),
    ({"top_p": "0.5"}, "top_p", "number"),
    ({"seed": -1}, "seed", "0"),
    ({"seed": 2**63}, "seed", ""),
    ({"stop": ["a"] * 17}, "stop", "at most 16"),
    ({"stop": ["a"] * 1000}, "stop", "at most 16"),
    ({"stop": ""}, "stop", "1 to 1000"),
    ({"stop": ["a", 3]}, "stop", "texts"),
    ({"stop": "a" * 1001}, "stop", "1000"),
    ({"stream": "yes"}, "stream", "boolean"),
    ({"stream_options": {"usage": True}}, "stream_options.usage", "no such field"),
    ({"nonsense": 1}, "nonsense", "no such field"),
]


@pytest.mark.parametrize(
    ("fields", "param", "reason"), BAD, ids=[f"{param}-{n}" for n, (_, param, _) in enumerate(BAD)]
)
def test_bad_fields_are_named(shared, fields, param, reason):
    status, error = shared.refused(**fields)
    assert (status, error["param"]) == (400, param)
    assert error["type"] == "invalid_request_error"
    assert error["message"].startswith(param.split("=")[0]) and reason in error["message"]


@pytest.fixture(scope="module")
def shared(loaded):
    """One server for all that is refused: it goes on."""
    from api import Api

    import eepass

    server = eepass.serve(loaded, port=0, warm_up=False)
    api = Api(server)
    yield api
    # nothing was decoded for any of it, and what is asked properly is answered
    assert api.metric("eepass_answer_tokens_total") == 0
    assert api.chat()[0] == 200
    server.kill_server(0)


BODIES = {
    "nothing": b"",
    "cut": b'{"messages": [{"role": "us',
    "list": b"[]",
    "text": b'"text"',
    "no UTF-8": b'{"messages": [{"role": "user", "content": "\xff"}]}',
    "lone surrogate": b'{"messages": [{"role": "user", "content": "a\\ud800b"}]}',
    "NaN": b'{"messages": [{"role": "user", "content": "a"}], "temperature": NaN}',
    "infinite": b'{"messages": [{"role": "user", "content": "a"}], "temperature": 1e999}',
    "deep": b"[" * 100_000,
    "deep field": b'{"messages": ' + b'{"a":' * 50_000,
    "form": b"messages=hello",
    "no messages": b'{"model": "tiny"}',
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_what_is_no_request_at_all(shared, body):
    status, reply, _ = shared.post("/v1/chat/completions", body)
    assert status == 400 and reply["error"]["type"] == "invalid_request_error"


def test_what_changes_nothing_is_accepted(start, says):
    neutral = {
        "user": "somebody", "metadata": {"a": "b"}, "store": False, "service_tier": "auto",
        "tools": [], "tool_choice": "none", "parallel_tool_calls": True, "n": 1, "stop": None,
        "response_format": {"type": "text"}, "logit_bias": None, "stream": None, "top_p": None,
        "stream_options": None, "frequency_penalty": 0, "presence_penalty": 0.0, "seed": None,
    }  # fmt: skip
    assert start().said(**neutral) == says(12)


def test_other_models_and_routes(shared):
    status, error = shared.refused(model="another")
    assert (status, error["code"], error["param"]) == (404, "model_not_found", "model")
    status, reply, _ = shared.get("/v1/models/another")
    assert (status, reply["error"]["code"]) == (404, "model_not_found")
    status, reply, _ = shared.get("/v1/nothing")
    assert (status, reply["error"]["message"]) == (404, "no such route")
    status, reply, headers = shared.get("/v1/chat/completions")
    assert (status, headers["allow"]) == (405, "POST") and "method" in reply["error"]["message"]
    for path in ("/reset", "/load_model", "/v1/models"):
        assert shared.post(path, {})[0] in (404, 405)


def test_prompts_that_are_too_long(start):
    api = start(max_prompt_tokens=20, max_answer_tokens=30)
    status, error = api.refused(messages=[{"role": "user", "content": "a" * 20}])
    assert (status, error["code"]) == (400, "context_length_exceeded")
    assert "21 tokens, and 20 at most" in error["message"]
    assert api.chat(messages=[{"role": "user", "content": "a" * 19}])[0] == 200
    status, error = api.refused(max_tokens=31)
    assert status == 400 and "30 tokens at most" in error["message"]
    # also before a stream
    assert api.refused(max_tokens=31, stream=True)[0] == 400


def test_an_error_in_the_server_is_no_secret_and_no_traceback(api, loaded, monkeypatch, says):
    def fails(*arguments, **options):
        raise KeyError("a prompt, say")

    with monkeypatch.context() as patch:
        patch.setattr(type(api.server.model), "chat", fails)
        status, reply, headers = api.chat()
    assert status == 500 and reply["error"]["type"] == "server_error"
    assert "a prompt" not in str(reply) and headers["x-request-id"] in reply["error"]["message"]
    assert api.said() == says(12)
