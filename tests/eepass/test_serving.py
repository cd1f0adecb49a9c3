"""The OpenAI protocol, spoken by its own client to a model that eepass decodes."""

import gc
import os
import threading
import time

import pytest
import torch
from models import tiny_model, tiny_tokenizer
from transformers.cli.serving.utils import DirectStreamer

import eepass
from eepass.checkpoints.models import LoadedModel
from eepass.errors import InputError
from eepass.hf.prepared import in_use
from eepass.runtime.engine.engine import Engine

openai = pytest.importorskip("openai", reason="the extra 'serve' is not installed")
pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")
pytest.importorskip("uvicorn", reason="the extra 'serve' is not installed")

CHAT = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def served():
    model = tiny_model("llama", num_hidden_layers=2)
    model.generation_config.eos_token_id = None
    eepass.prepare(model, max_length=512)
    loaded = LoadedModel("tiny", model, tiny_tokenizer(), None)
    server = eepass.serve(loaded, port=0, warm_up=False)
    yield loaded, server
    server.kill_server()
    assert not server._thread.is_alive()


@pytest.fixture
def client(served):
    with openai.OpenAI(base_url=served[1].url, api_key="none", max_retries=0, timeout=60) as made:
        yield made


def ask(client, **options):
    options = {"model": "tiny", "messages": CHAT, "max_tokens": 12, **options}
    return client.chat.completions.create(**options)


def expected(loaded, count, text="hello"):
    """What the model says in transformers' own loop."""
    ids = torch.tensor([loaded.encode(text)])
    said = loaded.model.generate(ids, max_new_tokens=count, do_sample=False, custom_generate=None)
    return loaded.tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True)


def passes(loaded):
    with in_use(loaded.model, 1) as transformed:
        return transformed.statistics.passes


def test_chat(served, client):
    loaded, _ = served
    before = passes(loaded)
    reply = ask(client)
    (choice,) = reply.choices
    assert choice.message.content == expected(loaded, 12) and choice.finish_reason == "length"
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (6, 12)
    assert passes(loaded) > before
    assert [model.id for model in client.models.list()] == ["tiny"]


def test_streaming(served, client):
    chunks = list(ask(client, stream=True, max_tokens=20))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == expected(served[0], 20)
    assert chunks[-1].choices[0].finish_reason == "length" and len(chunks) > 3


def test_completions_and_responses(served, client):
    said = client.completions.create(model="tiny", prompt="hello_", max_tokens=8)
    assert said.choices[0].text == expected(served[0], 8)
    said = client.responses.create(
        model="tiny", input="hello", max_output_tokens=8, stream=False
    )  # fmt: skip
    assert said.output_text == expected(served[0], 8)


def test_options(served, client):
    said = expected(served[0], 12)
    stop = said[len(said) // 2 :][:3]
    stopped = ask(client, stop=[stop]).choices[0]
    assert stopped.finish_reason == "stop" and len(stopped.message.content) < len(said)
    biased = ask(client, logit_bias={"5": 90}).choices[0].message.content
    assert biased == "w5 " * 12
    drawn = [
        ask(client, temperature=1.0, seed=seed).choices[0].message.content for seed in (3, 3, 4)
    ]
    assert drawn[0] == drawn[1] != drawn[2] != said
    assert ask(client, temperature=0).choices[0].message.content == said


def test_requests_are_decoded_together(served, client, monkeypatch):
    texts = ["one", "another one", "a third"]
    said, together = {}, []
    step = Engine.step

    def counted(self, sequences=None):
        together.append(len(self.sequences if sequences is None else sequences))
        step(self, sequences)

    monkeypatch.setattr(Engine, "step", counted)

    def work(text):
        messages = [{"role": "user", "content": text}]
        chunks = ask(client, messages=messages, stream=True, max_tokens=60)
        said[text] = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    threads = [threading.Thread(target=work, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert said == {text: expected(served[0], 60, text) for text in texts}
    assert max(together) > 1


def test_a_client_that_hangs_up_frees_the_engine(served, client, monkeypatch):
    loaded, _ = served
    put, tokens = DirectStreamer.put, []

    def slowly(self, value):
        tokens.append(value)
        time.sleep(0.01)
        put(self, value)

    monkeypatch.setattr(DirectStreamer, "put", slowly)
    stream = ask(client, stream=True, max_tokens=480)
    for _, _chunk in zip(range(3), stream, strict=False):
        pass
    stream.close()
    # waits for the engine
    assert ask(client).choices[0].message.content == expected(loaded, 12)
    # nobody goes on with what nobody reads
    assert 3 <= len(tokens) < 480
    with in_use(loaded.model, 1) as transformed:
        assert transformed.decoder.kv.unused and not transformed.engine.sequences


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"n": 2}, "n=2"),
        ({"logprobs": True}, "logprobs"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"messages": []}, "messages"),
        ({"messages": [{"content": "no role"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"text": "no type"}]}]}, "messages"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "no other parts",
        ),
        ({"max_tokens": 0}, "max_new_tokens"),
        ({"max_tokens": 900}, "prepared for 512"),
        ({"max_tokens": 900, "stream": True}, "prepared for 512"),
        ({"temperature": -1}, "temperature=-1"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"model": "another"}, "pinned to 'tiny'"),
        ({"extra_body": {"nonsense": 1}}, "nonsense"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_requests_are_rejected_with_the_reason(served, client, options, reason):
    with pytest.raises((openai.BadRequestError, openai.UnprocessableEntityError)) as refused:
        ask(client, **options)
    assert reason in refused.value.response.text
    assert passes(served[0]) >= 0 and ask(client, max_tokens=1).choices


def test_what_is_no_request_at_all(served, client):
    import httpx2

    for body in (b"", b"{", b"[]", b'"text"', b'{"model": "tiny"}'):
        found = httpx2.post(f"{client.base_url}chat/completions", content=body)
        assert found.status_code in (400, 422)


def test_the_model_comes_back_after_a_reset(served, client):
    client.post("/reset".replace("/", "../", 1), cast_to=object)
    assert ask(client).choices[0].message.content == expected(served[0], 12)


def test_a_port_in_use(served):
    loaded, server = served
    port = int(server.url.split(":")[2].split("/")[0])
    with pytest.raises(InputError, match=r"in use.*port="):
        eepass.serve(loaded, port=port)


def soak(client, served, count):
    """Resident memory in MiB after each tenth of ``count`` requests of all kinds."""
    kinds = [
        {},
        {"stream": True},
        {"temperature": 0.8, "seed": 3},
        {"stop": ["w5"]},
        {"messages": [{"role": "user", "content": "abc" * 4}]},
        {"n": 4},
    ]
    memory = []
    for index in range(count):
        try:
            reply = ask(client, **{"max_tokens": 8, **kinds[index % len(kinds)]})
            if index % 12 == 1:
                next(iter(reply))
                reply.close()
            elif not hasattr(reply, "choices"):
                list(reply)
        except openai.BadRequestError:
            assert "n" in kinds[index % len(kinds)]
        if (index + 1) % (count // 10) == 0:
            gc.collect()
            with open(f"/proc/{os.getpid()}/statm", encoding="ascii") as file:
                memory.append(int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20)
    with in_use(served[0].model, 1) as transformed:
        assert transformed.decoder.kv.unused and not transformed.engine.sequences
    return memory


def test_a_short_soak(served, client):
    soak(client, served, 12)
    memory = soak(client, served, 30)
    assert memory[-1] - memory[0] < 8


@pytest.mark.slow
def test_memory_stays_flat_over_four_hundred_requests(served, client):
    soak(client, served, 40)
    memory = soak(client, served, 400)
    assert memory[-1] - memory[0] < 8, memory
