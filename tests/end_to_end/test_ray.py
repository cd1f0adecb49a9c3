"""examples/serve_ray.py on this machine: two replicas behind one address (slow)."""

import runpy
import socket
from pathlib import Path

import pytest
import torch
from models import tiny_model, tiny_tokenizer

import eepass

pytestmark = pytest.mark.slow
ray = pytest.importorskip("ray", reason="the extra 'ray' is not installed")
openai = pytest.importorskip("openai", reason="the extra 'serve' is not installed")
ROOT = Path(__file__).parents[2]


@pytest.fixture
def url(tmp_path, monkeypatch):
    from ray import serve

    model = tiny_model("llama", num_hidden_layers=2)
    model.generation_config.eos_token_id = None
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    # a worker that dies is told of, not retried for minutes
    monkeypatch.setenv("RAY_SERVE_MAX_PER_REPLICA_RETRY_COUNT", "1")
    variables = {"MODEL": str(tmp_path), "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    ray.init(num_cpus=2, include_dashboard=False, runtime_env={"env_vars": variables})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        example = runpy.run_path(str(ROOT / "examples" / "serve_ray.py"))
        serve.run(example["Replica"].bind())
        yield f"http://127.0.0.1:{port}/v1", str(tmp_path)
    finally:
        serve.shutdown()
        ray.shutdown()


def test_two_replicas_answer(url):
    from ray import serve

    address, folder = url
    name = Path(folder).name
    (application,) = serve.status().applications.values()
    assert application.deployments["Replica"].replica_states == {"RUNNING": 2}
    loaded = eepass.load(folder)
    ids = torch.tensor([loaded.encode("hello")])
    said = loaded.model.generate(ids, max_new_tokens=12, do_sample=False)
    expected = loaded.tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True)
    client = openai.OpenAI(base_url=address, api_key="none", max_retries=0, timeout=300)
    messages = [{"role": "user", "content": "hello"}]
    for _ in range(6):
        reply = client.chat.completions.create(model=name, messages=messages, max_tokens=12)
        assert reply.choices[0].message.content == expected
    chunks = client.chat.completions.create(
        model=name, messages=messages, max_tokens=12, stream=True
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == expected
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model=name, messages=[])
