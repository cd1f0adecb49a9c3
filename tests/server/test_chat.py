"""Chat completions: what the model says alone, streamed or not, with what clients ask for."""

import threading

import pytest
import torch
from api import text_of


def test_the_answer_is_what_the_model_says_alone(api, says):
    status, reply, headers = api.chat()
    assert status == 200 and reply["object"] == "chat.completion" and reply["model"] == "tiny"
    (choice,) = reply["choices"]
    assert choice["message"] == {"role": "assistant", "content": says(12), "refusal": None}
    assert choice["finish_reason"] == "length" and choice["logprobs"] is None
    usage = {"prompt_tokens": 6, "completion_tokens": 12, "total_tokens": 18}
    assert reply["usage"] == usage and headers["x-request-id"]


def test_a_stream_says_the_same(api, says):
    events = api.events(max_tokens=40, stream_options={"include_usage": True})
    assert events[-1] == "[DONE]"
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert text_of(events) == says(40)
    assert events[-3]["choices"][0]["finish_reason"] == "length"
    usage = {"prompt_tokens": 6, "completion_tokens": 40, "total_tokens": 46}
    assert events[-2]["choices"] == [] and events[-2]["usage"] == usage
    assert len({event["id"] for event in events[:-1]}) == 1
    assert "usage" not in api.events()[0]


def test_requests_are_decoded_together_and_each_says_what_it_says_alone(api, says, slowly):
    texts, said = [f"text {number} " for number in range(6)], {}

    def ask(text):
        messages = [{"role": "user", "content": text}]
        said[text] = text_of(api.events(messages=messages, max_tokens=60))

    threads = [threading.Thread(target=ask, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert said == {text: says(60, f"{text}_") for text in texts}
    assert max(slowly) > 2


def test_one_at_a_time_where_that_is_asked_for(start, says, slowly):
    api = start(at_once=1)
    threads = [threading.Thread(target=api.said) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(slowly) == {1} and api.said() == says(12)


def test_the_roles_of_a_conversation_go_through_the_template(api, says):
    messages = [
        {"role": "developer", "content": "abc"},
        {
            "role": "user",
            "content": [{"type": "text", "text": "he"}, {"type": "text", "text": "y"}],
        },
        {"role": "assistant", "content": "ho"},
        {"role": "user", "content": "hello"},
    ]
    assert api.said(messages=messages) == says(12, "abc_hey_ho_hello_")


def test_stop_strings_are_not_part_of_the_answer(api, says):
    said = says(20)
    stop = said[22:26]
    cut = said[: said.index(stop)]
    _, reply, _ = api.chat(max_tokens=20, stop=[stop, "never"])
    (choice,) = reply["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == (cut, "stop")
    assert reply["usage"]["completion_tokens"] < 20
    events = api.events(max_tokens=20, stop=stop)
    assert text_of(events) == cut and events[-2]["choices"][0]["finish_reason"] == "stop"
    assert api.said(max_tokens=20, stop="never") == said
    # an end that only begins a stop string is part of the answer
    assert api.said(max_tokens=20, stop=said[-2:] + "and more") == said


def test_sampling_is_seeded_and_greedy_unless_asked_for(api, says):
    def drawn(**fields):
        return api.said(temperature=1.0, max_tokens=20, **fields)

    assert drawn(seed=3) == drawn(seed=3) != drawn(seed=4)
    assert drawn(seed=3) != says(20)
    assert api.said(max_tokens=20, temperature=0, seed=3) == says(20)
    assert api.said(max_tokens=20, top_p=0.9, seed=3) != says(20)
    # of a narrow nucleus one token is left
    assert drawn(top_p=0.0) == says(20) == drawn(top_k=1)


def test_choices_differ_by_their_seeds(api):
    options = {"temperature": 1.0, "max_tokens": 20}
    _, reply, _ = api.chat(n=3, seed=5, **options)
    texts = [choice["message"]["content"] for choice in reply["choices"]]
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2]
    assert texts == [api.said(seed=seed, **options) for seed in (5, 6, 7)]
    assert len(set(texts)) == 3 and reply["usage"]["completion_tokens"] == 60
    events = api.events(n=3, seed=5, **options)
    assert [text_of(events, index) for index in range(3)] == texts


def test_biases_and_penalties(api, original, loaded, says):
    assert api.said(logit_bias={"5": 100}) == "w5 " * 12
    assert "w65 " in says(12) and "w65 " not in api.said(logit_bias={"65": -100})
    # OpenAI's, by a loop without drafts or batches
    for frequency, presence in ((2.0, 0.0), (0.0, 2.0), (0.7, -0.9)):
        said = api.said(frequency_penalty=frequency, presence_penalty=presence, max_tokens=30)
        assert said == penalised(original, loaded.tokenizer, frequency, presence, 30) != says(30)


def penalised(original, tokenizer, frequency, presence, count):
    ids, out = tokenizer("hello_")["input_ids"], []
    for _ in range(count):
        logits = original(torch.tensor([[*ids, *out]])).logits[0, -1]
        for token in set(out):
            logits[token] -= frequency * out.count(token) + presence
        out.append(int(logits.argmax()))
    return tokenizer.decode(out)


def test_log_probabilities_are_those_of_the_model(api, original, loaded):
    _, reply, _ = api.chat(logprobs=True, top_logprobs=3, logit_bias={"5": 100}, max_tokens=4)
    entries = reply["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in entries] == ["w5 "] * 4
    assert entries[0]["bytes"] == list(b"w5 ")
    ids = loaded.tokenizer("hello_")["input_ids"]
    for entry in entries:
        expected = original(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        top = expected.topk(3)
        assert entry["logprob"] == pytest.approx(float(expected[5]), abs=1e-3)
        values = [one["logprob"] for one in entry["top_logprobs"]]
        assert values == pytest.approx(top.values.tolist(), abs=1e-3)
        ids.append(5)
    streamed = api.events(logprobs=True, max_tokens=9)
    parts = [choice["logprobs"] for event in streamed[1:-1] for choice in event["choices"]]
    tokens = [one["token"] for part in parts if part for one in part["content"]]
    assert "".join(tokens) == text_of(streamed) and len(tokens) == 9


def test_log_probabilities_end_where_the_text_is_cut(api, says):
    stop = says(12)[20:24]
    _, reply, _ = api.chat(logprobs=True, stop=stop)
    (choice,) = reply["choices"]
    tokens = "".join(one["token"] for one in choice["logprobs"]["content"])
    assert tokens.startswith(choice["message"]["content"])
    assert len(tokens) < len(choice["message"]["content"]) + 4


def test_end_tokens_end_an_answer(start, loaded, says, monkeypatch):
    words = says(12).split()
    ended = next(n for n, word in enumerate(words) if word != words[0])
    end = loaded.tokenizer.convert_tokens_to_ids(words[ended] + " ")
    monkeypatch.setattr(loaded.model, "stop", frozenset([end]))
    api = start()
    _, reply, _ = api.chat()
    (choice,) = reply["choices"]
    assert choice["finish_reason"] == "stop"
    assert choice["message"]["content"] == "".join(f"{word} " for word in words[:ended])
    # the end token is one of the answer's
    assert reply["usage"]["completion_tokens"] == ended + 1
    assert api.said(ignore_eos=True) == says(12)


def test_a_longest_answer_where_none_is_asked_for(start):
    api = start(max_answer_tokens=7)
    _, reply, _ = api.chat(max_tokens=None)
    assert reply["usage"]["completion_tokens"] == 7
    _, reply, _ = api.chat(max_tokens=None, max_completion_tokens=5)
    assert reply["usage"]["completion_tokens"] == 5
