"""What serving.py draws, sends and reports; its servers here stream at a known pace."""

import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from models import tiny_tokenizer

pytest.importorskip("httpx2", reason="the extra 'serve' is not installed")
pytest.importorskip("uvicorn", reason="the extra 'serve' is not installed")

from benchmarks import serving
from benchmarks.under_load import figures, servers, systems, work
from benchmarks.under_load.servers import System
from benchmarks.under_load.work import Load
from eepass.errors import InputError

# seconds to the first token of a request that need not wait, and between its tokens
FIRST, EACH = 0.03, 0.004
STAND_IN = """
import asyncio, json, os, sys
from pathlib import Path

import uvicorn

port, at_once, refuses = int(sys.argv[1]), int(sys.argv[4]), sys.argv[5:]
FIRST, EACH = map(float, sys.argv[2:4])
log, slots = Path(__file__).with_name(f"log-{port}"), asyncio.Semaphore(at_once)
log.write_text(json.dumps({"pid": os.getpid()}) + "\\n")

async def app(scope, receive, send):
    async def respond(status, kind):
        headers = [(b"content-type", kind)]
        await send({"type": "http.response.start", "status": status, "headers": headers})

    async def finish(data):
        await send({"type": "http.response.body", "body": json.dumps(data).encode()})

    async def event(data):
        body = b"data: " + (data if isinstance(data, bytes) else json.dumps(data).encode())
        await send({"type": "http.response.body", "body": body + b"\\n\\n", "more_body": True})

    def choice(text, reason=None):
        return {"choices": [{"delta": {"content": text}, "finish_reason": reason}]}

    if scope["method"] == "GET":
        await respond(200, b"application/json")
        return await finish({"data": [{"id": "stand-in"}]})
    body = json.loads((await receive())["body"])
    with log.open("a") as file:
        file.write(json.dumps(body) + "\\n")
    if any(name in body for name in refuses):
        await respond(400, b"application/json")
        return await finish({"error": {"message": f"unknown field {refuses}"}})
    if not body.get("stream"):
        await respond(200, b"application/json")
        return await finish({"choices": []})
    await respond(200, b"text/event-stream")
    await event(choice("", None))
    async with slots:
        await asyncio.sleep(FIRST)
        for index in range(body["max_tokens"] // 2):
            if index:
                await asyncio.sleep(2 * EACH)
            # two tokens a piece
            await event(choice("ab cd "))
    await event(choice(None, "length"))
    counts = {"completion_tokens": body["max_tokens"] // 2 * 2,
              "prompt_tokens": len(body["messages"][0]["content"])}
    if body["stream_options"]["include_usage"]:
        await event({"choices": [], "usage": counts})
    await event(b"[DONE]")
    await send({"type": "http.response.body"})

uvicorn.run(app, port=port, lifespan="off", log_level="error")
"""


def options_of(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["serving.py", "model.gguf", "--prompts", "p", *arguments])
    return serving.parse()


def test_the_systems_that_are_asked_for(monkeypatch, tmp_path):
    monkeypatch.setattr(systems, "gguf_of", Path)
    given = options_of(
        monkeypatch, "--with", "llama.cpp", "--threads", "3", "--quantize", "keep",
        "--artifact", "drafts", "--server", "mine=serve --port {port}",
    )  # fmt: skip
    found = systems.all_systems(given, tmp_path)
    assert list(found) == [*systems.EXACT, "llama.cpp", "mine"]
    dense, one = (" ".join(found[name].command) for name in systems.EXACT[1:])
    assert "serve model.gguf" in dense and "--artifact drafts" in dense and "--dense" in dense
    assert "--quantize keep" in one and "--threads 3" in one and one.endswith("--at-once 1")
    python = " ".join(found["llama.cpp"].command)
    assert "-m llama_cpp.server" in python and "--interrupt_requests False" in python
    given = options_of(
        monkeypatch, "--with", "llama.cpp", "--llama-server", "built", "--clients", "1,20",
        "--only", "llama.cpp",
    )  # fmt: skip
    (own,) = systems.all_systems(given, tmp_path).values()
    assert own.command[0] == "built" and own.command[own.command.index("--parallel") + 1] == "20"
    for wrong, reason in ((["--only", "mine"], "--only mine"), (["--with", "vllm"], "--vllm")):
        with pytest.raises(InputError, match=reason):
            systems.all_systems(options_of(monkeypatch, *wrong), tmp_path)


@pytest.mark.parametrize("wrong", ["--clients=0", "--rate=-1", "--seconds=0", "--clients=a"])
def test_numbers_that_are_none_are_refused(monkeypatch, capsys, wrong):
    with pytest.raises(SystemExit):
        options_of(monkeypatch, wrong)
    assert wrong.partition("=")[0] in capsys.readouterr().err


@pytest.fixture
def stand_in(tmp_path):
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    return f"{sys.executable} {tmp_path / 'stand_in.py'} {{port}} {FIRST} {EACH}"


def logs(folder):
    """What each stand-in noted, the first line apart."""
    files = [file.read_text().splitlines() for file in sorted(folder.glob("log-*"))]
    return [[json.loads(line) for line in lines] for lines in files]


def test_the_whole_script(stand_in, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(work, "ANSWER_TOKENS", (8, 24))
    loaded = SimpleNamespace(tokenizer=tiny_tokenizer())
    monkeypatch.setattr(serving.eepass, "load", lambda *args, **options: loaded)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("why", "how")))
    names = ("eepass", "eepass one after another", "other")
    commands = (f"{stand_in} 99", f"{stand_in} 1", f"{stand_in} 99 ignore_eos")
    given = [f"--server={name}={command}" for name, command in zip(names, commands, strict=True)]
    file = tmp_path / "found.json"
    options = [
        "--prompts", str(prompts), "--clients", "4", "--rate", "40", "--requests", "8",
        "--rounds", "2", "--only", ",".join(names), "--json", str(file), *given,
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["serving.py", "tiny", *options])
    serving.main()
    report = json.loads(file.read_text())
    assert report["rounds"] == 2 and report["rates"].keys() == {"40/s"}
    assert list(report["clients"]) == ["4"]
    for clients, by_system in report["clients"].items():
        assert list(by_system) == list(names)
        for name, found in by_system.items():
            assert (found["requests"], found["failed"], found["ended_early"] < 16) == (16, 0, True)
            assert found["counted_by_server"] and found["prompt_tokens"] > 16 * 20
            assert found["tokens"] == by_system["eepass"]["tokens"]
            # it cannot be faster than its pace
            at_once = 1 if name == names[1] else int(clients)
            assert 0 < found["tokens_per_s"] < at_once / EACH
            assert found["first_token_ms"]["50"] >= 1e3 * FIRST
            # the two tokens of the first piece are not waited for
            assert found["ms_per_token"]["50"] > 1e3 * EACH * 6 / 8
            assert found["gap_ms"]["50"] >= 2e3 * EACH
            assert 10 < found["peak_mb"] < 1000 and 0 < found["client_cpu"] < 1
    # all that arrived was answered within its window
    arriving = report["rates"]["40/s"]["eepass"]
    tokens = arriving["tokens_per_s"] / arriving["requests_per_s"]
    assert tokens == pytest.approx(arriving["tokens"] / 16, rel=0.3)
    four = report["clients"]["4"]
    assert four["eepass"]["over"][names[1]]["tokens_per_s"] > 2
    assert four["eepass"]["over"][names[1]]["first_token_95"] < 0.5
    assert four["eepass"]["same_answers"] == {"same": 16, "of": 16}
    assert "same_answers" not in four["other"]
    noted = logs(tmp_path)
    assert not any(os.path.exists(f"/proc/{lines[0]['pid']}") for lines in noted)
    # the same work for each, and the field left out where it is refused
    asked = [
        sorted(body["messages"][0]["content"] for body in lines[1:] if body.get("stream"))
        for lines in noted
    ]
    assert asked[0] == asked[1] == asked[2] and len(asked[0]) > 16
    sent = [lines[-1].get("ignore_eos") for lines in noted]
    assert sorted(sent, key=bool) == [None, True, True]
    printed = capsys.readouterr().out
    assert "one after another" in printed and max(map(len, printed.splitlines())) <= 80


def test_systems_take_turns_at_the_same_work(monkeypatch):
    loads, blocks = [Load(clients=1), Load(clients=2)], []
    monkeypatch.setattr(serving, "measure_block", lambda *block: blocks.append(block) or block)
    drawn = SimpleNamespace(order=lambda load, turn: (turn, load.name))
    *_, found = serving.measure({"a": "A", "b": "B", "c": "C"}, loads, drawn, 3)
    turns = [blocks[first : first + 3] for first in range(0, len(blocks), 3)]
    assert [order for (_, order), *_ in turns] == [(t, n) for t in range(3) for n in "12"]
    for turn in turns:
        assert {name for name, _ in turn} == set("ABC") and len({order for _, order in turn}) == 1
    # each is the first in one round of each load
    for place in (0, 1):
        assert {turn[0][0] for turn in turns[place::2]} == set("ABC")
    assert found["2"]["b"] == [("B", (turn, "2")) for turn in range(3)]


def test_a_server_sleeps_until_its_turn(stand_in, tmp_path):
    def wait_for(server, *states):
        """A signal takes its time."""
        for _ in range(500):
            stat = Path(f"/proc/{server.process.pid}/stat").read_text()
            if stat.rpartition(")")[2].split()[0] in states:
                return True
            time.sleep(0.01)
        return False

    system = System.parse(f"a server={stand_in} 1")
    with servers.running(system, tmp_path) as server:
        assert server.model == "stand-in" and server.extra == {"ignore_eos": True}
        assert wait_for(server, "T")
        server.resume()
        assert wait_for(server, "R", "S")
        server.forget_peak()
        assert server.peak_mb() > 10
    assert not os.path.exists(f"/proc/{server.process.pid}")


def test_refused_requests_are_counted_and_named(stand_in, tmp_path):
    system = System.parse(f"busy={stand_in} 1 stream")
    order = work.draw_order(Load(clients=2), [[1, 2]], str, None, 4, "a")
    with servers.running(system, tmp_path) as server:
        found = figures.figures_of([serving.measure_block(server, order)])
    assert (found["requests"], found["failed"], found["tokens_per_s"]) == (4, 4, 0)
    assert "status 400" in found["failure"] and "unknown field" in found["failure"]
    assert found["first_token_ms"]["50"] is None


def test_a_server_that_does_not_start_or_go_on_is_named(stand_in, tmp_path):
    ends = System("broken", [sys.executable, "-c", "print('no such model'); exit(3)", "{port}"])
    with (
        pytest.raises(InputError, match=r"broken: .*status 3: no such model"),
        servers.running(ends, tmp_path),
    ):
        pass
    order = {"clients": 1, "seconds": None, "arrivals": [], "requests": []}
    with (
        pytest.raises(InputError, match=r"killed: .*status -9"),
        servers.running(System.parse(f"killed={stand_in} 1"), tmp_path) as server,
    ):
        server.process.kill()
        serving.measure_block(server, order)
    missing = System("missing", ["no-such-program", "{port}"])
    with (
        pytest.raises(InputError, match=r"missing: no-such-program: No such file"),
        servers.running(missing, tmp_path),
    ):
        pass
    with pytest.raises(InputError, match="NAME=COMMAND"):
        System.parse("name only")
