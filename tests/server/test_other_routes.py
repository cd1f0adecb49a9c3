"""Text completions, responses, and what else a server is asked."""

import pytest


def test_completions(api, says):
    status, reply, _ = api.post("/v1/completions", {"prompt": "hello_", "max_tokens": 8})
    assert status == 200 and reply["object"] == "text_completion"
    assert reply["choices"] == [
        {"index": 0, "text": says(8), "logprobs": None, "finish_reason": "length"}
    ]
    # as many as OpenAI gives where none are asked for
    _, reply, _ = api.post("/v1/completions", {"prompt": "hello_"})
    assert reply["usage"]["completion_tokens"] == 16
    events = api.events("/v1/completions", prompt="hello_", max_tokens=8)
    assert "".join(event["choices"][0]["text"] for event in events[:-1]) == says(8)
    assert events[-1] == "[DONE]"


def test_several_prompts_and_token_ids(api, loaded, says):
    ids = loaded.tokenizer("hello_")["input_ids"]
    for prompt, expected in (
        (["hello_", "abc"], [says(5), says(5, "abc")]),
        (ids, [says(5)]),
        ([ids, ids[:2]], [says(5), says(5, "he")]),
    ):
        _, reply, _ = api.post("/v1/completions", {"prompt": prompt, "max_tokens": 5})
        assert [choice["text"] for choice in reply["choices"]] == expected
        assert reply["usage"]["completion_tokens"] == 5 * len(expected)
    _, reply, _ = api.post("/v1/completions", {"prompt": ["a", "b"], "n": 2, "max_tokens": 2})
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": " \n"}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", ""]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [1, 160]}, "prompt"),
        ({"prompt": [1, -1]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [1.0]}, "prompt"),
        ({"prompt": ["a"] * 17}, "prompt"),
        ({"prompt": ["a"] * 4, "n": 5}, "prompt"),
        ({"prompt": "a", "echo": True}, "echo"),
        ({"prompt": "a", "best_of": 2}, "best_of"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "logprobs": 6}, "logprobs"),
        ({"prompt": "a", "messages": []}, "messages"),
    ],
    ids=str,
)
def test_bad_completions(api, fields, param):
    status, error = api.refused("/v1/completions", **fields)
    assert (status, error["param"]) == (400, param)


def test_log_probabilities_of_completions(api, says):
    body = {"prompt": "hello_", "max_tokens": 4, "logprobs": 2}
    _, reply, _ = api.post("/v1/completions", body)
    found = reply["choices"][0]["logprobs"]
    assert "".join(found["tokens"]) == says(4)
    lengths = [len(token) for token in found["tokens"]]
    assert found["text_offset"] == [sum(lengths[:n]) for n in range(4)]
    for token, value, top in zip(
        found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True
    ):
        assert len(top) == 2 and max(top.values()) == top[token] == value


def test_responses(api, says):
    body = {"input": "hello", "max_output_tokens": 8}
    status, reply, _ = api.post("/v1/responses", body)
    assert status == 200 and reply["status"] == "incomplete"
    assert reply["incomplete_details"] == {"reason": "max_output_tokens"}
    assert reply["output"][0]["content"][0]["text"] == says(8)
    assert reply["usage"]["total_tokens"] == 14
    before = {"instructions": "abc", "input": [{"role": "user", "content": "hello"}]}
    _, reply, _ = api.post("/v1/responses", {**before, "max_output_tokens": 8})
    assert reply["output"][0]["content"][0]["text"] == says(8, "abc_hello_")
    # an answer may be given back as it came
    again = [{"role": "user", "content": "a"}, reply["output"][0], {"role": "user", "content": "b"}]
    assert api.post("/v1/responses", {"input": again, "max_output_tokens": 3})[0] == 200


def test_responses_stream_only_when_asked(api, says):
    events = api.events("/v1/responses", input="hello", max_output_tokens=8)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    kinds = [event["type"] for event in events]
    assert kinds[:4] == [
        "response.created", "response.in_progress", "response.output_item.added",
        "response.content_part.added",
    ]  # fmt: skip
    deltas = [event["delta"] for event in events if event["type"] == "response.output_text.delta"]
    assert "".join(deltas) == says(8) and len(deltas) > 1
    assert kinds[-1] == "response.incomplete"
    assert events[-1]["response"]["output"][0]["content"][0]["text"] == says(8)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "input"),
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"type": "image"}]}, "input.0.role"),
        ({"input": "a", "tools": [{}]}, "tools"),
        ({"input": "a", "previous_response_id": "resp_1"}, "previous_response_id"),
        ({"input": "a", "text": {"format": {"type": "json_object"}}}, "text"),
        ({"input": "a", "background": True}, "background"),
        ({"input": "a", "max_output_tokens": 0}, "max_output_tokens"),
        ({"input": "a", "stop": ["b"]}, "stop"),
    ],
    ids=str,
)
def test_bad_responses(api, fields, param):
    status, error = api.refused("/v1/responses", **fields)
    assert (status, error["param"]) == (400, param)


def test_the_models_id_shows_no_path(start):
    api = start()
    _, reply, _ = api.get("/v1/models")
    (entry,) = reply["data"]
    assert (entry["id"], entry["object"], entry["owned_by"]) == ("tiny", "model", "eepass")
    assert api.get("/v1/models/tiny")[1] == entry
    named = start(name="org/other")
    assert named.get("/v1/models/org/other")[0] == 200
    assert named.refused(model="tiny")[0] == 404 and named.chat(model="org/other")[0] == 200
    _, metrics, _ = named.get("/metrics")
    assert "folder" not in metrics


def test_health(api):
    assert api.get("/health")[:2] == (200, {"status": "ok"})


def test_openais_client_understands_it(api, says):
    openai = pytest.importorskip("openai", reason="it is for tests alone")
    with openai.OpenAI(base_url=api.url, api_key="none", max_retries=0) as client:
        chat = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}]}
        reply = client.chat.completions.create(**chat, max_tokens=12)
        assert reply.choices[0].message.content == says(12)
        chunks = list(client.chat.completions.create(**chat, max_tokens=12, stream=True))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == says(12)
        assert chunks[-1].choices[0].finish_reason == "length"
        said = client.responses.create(model="tiny", input="hello", max_output_tokens=8)
        assert said.output_text == says(8)
        assert [model.id for model in client.models.list()] == ["tiny"]
        with pytest.raises(openai.BadRequestError, match="n: "):
            client.chat.completions.create(**chat, n=99)
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(**{**chat, "model": "another"})
