"""Metrics, the log, and a graceful end."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from api import Api, text_of
from word_model import save_word_model

ROOT = Path(__file__).parents[2]


def test_metrics(api, slowly):
    for _ in range(3):
        api.chat(max_tokens=10)
    api.events(max_tokens=10)
    api.chat(max_tokens=0)
    api.get("/v1/made/up")
    missing = 'eepass_requests_total{route="other",status="404"}'
    api.wait_for(lambda: missing in api.get("/metrics")[1])
    _, text, headers = api.get("/metrics")
    assert headers["content-type"].startswith("text/plain; version=0.0.4")
    chat = 'eepass_requests_total{route="/v1/chat/completions",status="%d"}'
    assert api.metric(chat % 200) == 4 and api.metric(chat % 400) == 1
    assert api.metric(missing) == 1
    assert api.metric("eepass_prompt_tokens_total") == 24
    assert api.metric("eepass_answer_tokens_total") == 40
    assert api.metric("eepass_time_to_first_token_seconds_count") == 4
    assert api.metric("eepass_time_per_token_seconds_count") == 4
    assert api.metric("eepass_time_per_token_seconds_sum") > 0
    assert api.metric("eepass_passes_total") == len(slowly)
    # the first token of each is the prompt's
    per_pass = api.metric("eepass_tokens_per_pass")
    assert per_pass == pytest.approx(
        api.metric("eepass_decoded_tokens_total") / api.metric("eepass_passes_total")
    )
    modes = [line for line in text.splitlines() if line.startswith("eepass_mode{")]
    assert sum(float(line.split()[1]) for line in modes) == 1
    assert api.metric("eepass_cache_slots") == 512 and api.slots_used == 0
    with api.stream(max_tokens=400) as stream:
        next(iter(stream))
        assert api.metric("eepass_running") == 1 and api.slots_used >= 6
    assert "hello" not in text


def test_the_log_has_a_line_a_request_and_no_text(start, caplog):
    api = start(log_level="info", api_key="secret")
    key = {"authorization": "Bearer secret"}
    secret = {"messages": [{"role": "user", "content": "my_private_words"}], "max_tokens": 5}
    api.post("/v1/chat/completions", secret, **key)
    api.post("/v1/chat/completions", {**secret, "stream": True}, **key)
    api.post("/v1/chat/completions", {**secret, "my_private_words": 1}, **key)
    api.post("/v1/chat/completions", {**secret, "model": "my_private_words"}, **key)
    api.post("/v1/my_private_words", secret, **key)
    api.get("/health?my_private_words=1")
    # a line comes when its answer has been sent
    api.wait_for(lambda: len(caplog.records) == 6)
    lines = [json.loads(record.getMessage()) for record in caplog.records]
    assert [line["status"] for line in lines] == [200, 200, 400, 404, 404, 200]
    first = lines[0]
    assert first["route"] == "/v1/chat/completions" and first["method"] == "POST"
    assert (first["prompt_tokens"], first["answer_tokens"]) == (17, 5)
    assert first["seconds"] >= first["first_token_seconds"] > 0 and first["id"] and first["time"]
    assert lines[4]["route"] == "other" and lines[5]["route"] == "/health"
    assert "private" not in caplog.text and "secret" not in caplog.text


def test_the_log_of_a_fault_has_its_place_and_no_text(start, caplog, monkeypatch):
    api = start(log_level="info")

    def fails(*arguments):
        raise KeyError("_".join(["my", "private", "words"]))

    monkeypatch.setattr(type(api.server.model), "chat", fails)
    assert api.chat()[0] == 500
    api.wait_for(lambda: "/v1/chat/completions" in caplog.text)
    assert "KeyError" in caplog.text and "test_operation.py" in caplog.text
    assert "my_private" not in caplog.text


def test_the_log_says_who_hung_up(start, caplog, slowly):
    api = start(log_level="info")
    with api.stream(max_tokens=400) as stream:
        next(iter(stream))
    api.wait_for(lambda: "client_gone" in caplog.text)


def test_running_answers_end_and_new_ones_are_refused(start, says, slowly):
    api = start(stop_timeout=30)
    with api.stream(max_tokens=150) as stream:
        events = [next(iter(stream))]
        stopping = threading.Thread(target=api.server.kill_server)
        stopping.start()
        api.wait_for(lambda: api.get("/health")[0] == 503)
        status, reply, headers = api.chat()
        assert (status, reply["error"]["code"]) == (503, "stopping")
        assert headers["connection"] == "close"
        events += stream
    stopping.join()
    assert text_of(events) == says(150)
    assert events[-2]["choices"][0]["finish_reason"] == "length" and events[-1] == "[DONE]"
    with pytest.raises(OSError):
        api.socket()


def test_answers_that_take_too_long_are_ended_with_a_reason(start, says, slowly):
    api = start()
    found = []
    waiting = threading.Thread(target=lambda: found.append(api.refused(max_tokens=200)))
    waiting.start()
    with api.stream(max_tokens=200) as stream:
        events = [next(iter(stream))]
        api.wait_for(lambda: api.metric("eepass_running") == 2)
        stopping = threading.Thread(target=api.server.kill_server, args=(0.3,))
        stopping.start()
        events += stream
    for thread in (waiting, stopping):
        thread.join()
    assert events[-1] == "[DONE]" and events[-2]["choices"][0]["finish_reason"] == "length"
    text = text_of(events)
    assert 0 < len(text) < len(says(200)) and says(200).startswith(text)
    # who gets one answer, whole or not at all, is told
    ((status, error),) = found
    assert (status, error["code"]) == (503, "stopping")
    assert not api.server.model.current().engine.sequences


# the command, without minutes of compiling
COMMAND = """
import sys
sys.path[:0] = {paths}
from models import eager_compile
import eepass.early_exit_model
class AsTraced:
    kernels_missing = ""
    def __call__(self, graph, structure, examples, *, logits=False):
        return eager_compile(graph, structure, examples, logits=logits)
eepass.early_exit_model._cpu_compiler = AsTraced
from eepass.runtime.engine.engine import Engine
step = Engine.step
def slow(self, sequences=None):
    import time
    time.sleep(0.02)
    step(self, sequences)
Engine.step = slow
from eepass.cli.main import main
main()
"""


@pytest.mark.parametrize(
    ("number", "code"),
    [
        pytest.param(signal.SIGTERM, 0, id="TERM"),
        pytest.param(signal.SIGINT, 130, id="INT", marks=pytest.mark.slow),
    ],
)
def test_signals_end_the_command(tmp_path, number, code):
    save_word_model(tmp_path, artifact=False)
    file = tmp_path / "serve.toml"
    file.write_text("port = 0\nmax-answer-tokens = 400\nstop_timeout = 60\nwarm-up = false\n")
    program = COMMAND.format(paths=[str(ROOT), str(ROOT / "tests")])
    command = [
        sys.executable, "-c", program, "serve", str(tmp_path), "--dtype", "fp32", "--config",
        str(file), "--stop-timeout", "0.5", "--cache-tokens", "512", "--name", "tiny",
    ]  # fmt: skip
    environment = {**os.environ, "EEPASS_API_KEY": "", "COLUMNS": "200"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        address = process.stdout.readline().split()[2].rstrip(";")
        api = Api(type("", (), {"url": address}))
        status, _, _ = api.post("/v1/completions", {"prompt": "w5 w6", "max_tokens": 401})
        assert status == 400
        with api.stream("/v1/completions", prompt="w5 w6", max_tokens=400) as stream:
            events = [next(iter(stream))]
            process.send_signal(number)
            began = time.monotonic()
            events += stream
        assert process.wait(30) == code
        assert time.monotonic() - began < 20
        logged = process.stderr.read()
    assert events[-1] == "[DONE]" and events[-2]["choices"][0]["finish_reason"] == "length"
    lines = [json.loads(line) for line in logged.splitlines() if line.startswith("{")]
    assert [line["status"] for line in lines] == [400, 200] and "Traceback" not in logged
