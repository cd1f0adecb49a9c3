"""Many clients of all kinds for a while: answers stay right, nothing is lost, memory stays flat."""

import gc
import os
import random
import threading
import time
from collections import Counter

import pytest
from api import text_of

CLIENTS, LONGEST = 8, 80
PROMPTS = [
    "a", "hello", "hello again", "abcabcabcabc", "x" * 60, "w5 w6 w7", "the same beginning, one",
    "the same beginning, two", "the same beginning, three and more of it",
]  # fmt: skip
SAMPLED = {"temperature": 1.0, "seed": 7}
WRONG = [
    {"n": 99}, {"max_tokens": -1}, {"stop": ["a"] * 99}, {"messages": []}, {"nonsense": 1},
    {"temperature": "hot"}, {"model": "another"}, {"tools": [1]}, {"max_tokens": 10_000},
]  # fmt: skip


class Soak:
    """Asks ``api`` as random clients do; ``found`` counts what was asked, ``wrong`` what differs
    from the answers each prompt gets alone."""

    def __init__(self, api):
        self.api, self.found, self.wrong = api, Counter(), []
        # by prompt: of a longer answer, each shorter one is the beginning
        self.greedy = {prompt: self.alone(prompt) for prompt in PROMPTS}
        self.sampled = {prompt: self.alone(prompt, **SAMPLED) for prompt in PROMPTS}

    def alone(self, prompt, **fields):
        _, reply, _ = self.api.chat(**self.fields(prompt, LONGEST), **fields, logprobs=True)
        (choice,) = reply["choices"]
        # special tokens have no text
        tokens = [entry["token"] for entry in choice["logprobs"]["content"]]
        return ["" if token.startswith("<") else token for token in tokens]

    def fields(self, prompt, count):
        return {"messages": [{"role": "user", "content": prompt}], "max_tokens": count}

    def client(self, seed, goes_on):
        chance = random.Random(seed)
        while goes_on():
            kinds = ("greedy", "greedy", "sampled", "stream", "stop", "hang up", "wrong", "leave")
            kind = chance.choice(kinds)
            prompt, count = chance.choice(PROMPTS), chance.randint(1, LONGEST)
            try:
                getattr(self, "ask_" + kind.replace(" ", "_"))(chance, prompt, count)
            except Exception as error:
                self.wrong.append((kind, prompt, count, repr(error)))
            self.found[kind] += 1

    def ask_greedy(self, chance, prompt, count):
        self.expect(self.api.said(**self.fields(prompt, count)), self.greedy[prompt][:count])

    def ask_sampled(self, chance, prompt, count):
        said = self.api.said(**self.fields(prompt, count), **SAMPLED)
        self.expect(said, self.sampled[prompt][:count])

    def ask_stream(self, chance, prompt, count):
        events = self.api.events(**self.fields(prompt, count))
        assert events[-1] == "[DONE]"
        self.expect(text_of(events), self.greedy[prompt][:count])

    def ask_stop(self, chance, prompt, count):
        stop = self.greedy[prompt][count - 1] or "never"
        said = "".join(self.greedy[prompt]).partition(stop)[0]
        self.expect(self.api.said(**self.fields(prompt, LONGEST), stop=stop), [said])

    def ask_hang_up(self, chance, prompt, count):
        with self.api.stream(**self.fields(prompt, LONGEST)) as stream:
            for _, _event in zip(range(chance.randint(0, 5)), stream, strict=False):
                pass

    def ask_leave(self, chance, prompt, count):
        body = b'{"messages": [{"role": "user", "content": "' + prompt.encode() + b'"}]}'
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
        with self.api.socket() as connection:
            data = head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body
            connection.sendall(data[: chance.randint(1, len(data))])
            time.sleep(chance.random() / 50)

    def ask_wrong(self, chance, prompt, count):
        status, _ = self.api.refused(**{**self.fields(prompt, count), **chance.choice(WRONG)})
        assert status in (400, 404)

    def expect(self, said, tokens):
        assert said == "".join(tokens)

    def run(self, seed, count=None, seconds=None):
        """So many requests, or so many seconds of them."""
        until = time.monotonic() + (seconds or 1e9)
        done = self.found.total()

        def goes_on():
            few = count is None or self.found.total() - done < count
            return few and time.monotonic() < until

        clients = [
            threading.Thread(target=self.client, args=(seed + n, goes_on)) for n in range(CLIENTS)
        ]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        return self.memory()

    def memory(self):
        """Resident memory in MiB once nothing runs."""
        self.api.wait_for(lambda: self.api.slots_used == 0)
        self.api.wait_for(lambda: self.api.metric("eepass_running") == 0)
        gc.collect()
        with open(f"/proc/{os.getpid()}/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def check(api, soak, memory):
    assert not soak.wrong, (len(soak.wrong), soak.wrong[:5])
    assert len(soak.found) == 7 and min(soak.found.values()) > 5
    assert max(memory) - min(memory) < 30, memory
    # no slot is lost: the longest request there may be still fits
    longest = api.server.model.longest
    assert api.chat(max_tokens=longest - 6)[0] == 200
    app = api.server.app
    api.wait_for(lambda: not app.service.tickets and app.guards.held == 0)
    api.wait_for(lambda: not api.server._server.server_state.connections)


def test_a_minute_of_many_clients(start):
    api = start()
    soak = Soak(api)
    # what is made once
    soak.run(1, seconds=10)
    memory = [soak.run(100 * n, seconds=16) for n in range(1, 4)]
    check(api, soak, memory)


@pytest.mark.slow
def test_two_thousand_requests(start):
    api = start()
    soak = Soak(api)
    soak.run(1, count=200)
    memory = [soak.run(100 * n, count=200) for n in range(1, 11)]
    assert soak.found.total() >= 2200
    check(api, soak, memory)


def test_the_soak_sees_what_is_wrong(start, monkeypatch):
    """What it is there for: an answer that depends on its company."""
    from eepass.server.answers import Answer

    api = start()
    soak = Soak(api)
    add, calls = Answer.add, iter(range(10**9))

    def sometimes(self, token, scored):
        return add(self, token if next(calls) % 50 else 3, scored)

    monkeypatch.setattr(Answer, "add", sometimes)
    soak.run(1, count=60)
    assert soak.wrong
