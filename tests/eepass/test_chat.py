"""A conversation: its history, its room, and the terminal it is held in."""

import fcntl
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from command_line import refused, run
from models import AsTraced, tiny_tokenizer
from word_model import save_word_model

from eepass.checkpoints.models import LoadedModel
from eepass.cli.chat import Session
from eepass.conversation import Conversation
from eepass.errors import InputError
from eepass.runtime.engine import engine
from eepass.runtime.sampling import Sampling

ROOT = Path(__file__).parents[2]
PROMPT = r">>> $"


@pytest.fixture
def loaded():
    tokenizer = tiny_tokenizer()
    # no end token: answers have the length that was asked for
    tokenizer.eos_token = None
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=None))
    return LoadedModel("tiny", model, tokenizer, None)


@pytest.fixture
def ready(transformed):
    made = transformed.share()
    made.record()
    return made


def expected(loaded, ready, messages, count):
    """What dense decoding says after ``messages``."""
    ids = loaded.encode_messages(
        [{"role": "user", "content": text} for text in messages]
    )  # fmt: skip
    return decoded(loaded, ready, ids, count)


def decoded(loaded, ready, ids, count):
    tokens = [step.token for step in ready.dense.generate(ids, count)]
    return loaded.tokenizer.decode(tokens, skip_special_tokens=True)


def test_a_question_comes_after_what_was_said(loaded, ready):
    conversation = Conversation(loaded, ready, new_tokens=6)
    first = "".join(conversation.ask("hello"))
    assert first == expected(loaded, ready, ["hello"], 6) and conversation.cut
    second = "".join(conversation.ask("and"))
    assert second == expected(loaded, ready, ["hello", first, "and"], 6)
    conversation.instruct("be brief")
    third = "".join(conversation.ask("now"))
    assert third == expected(
        loaded, ready, ["be brief", "hello", first, "and", second, "now"], 6
    )  # fmt: skip
    conversation.clear()
    assert "".join(conversation.ask("hello")) == expected(loaded, ready, ["be brief", "hello"], 6)
    assert conversation.all == conversation.last


def test_what_was_run_is_not_run_again(loaded, ready, monkeypatch):
    run, begun = engine.run_chunk, {}

    def counted(sequence, *options):
        begun.setdefault(sequence, sequence.num_prefilled)
        return run(sequence, *options)

    monkeypatch.setattr(engine, "run_chunk", counted)
    conversation = Conversation(loaded, ready, new_tokens=6)
    first = "".join(conversation.ask("how are you this morning"))
    list(conversation.ask("and"))
    kept = len(loaded.encode("how are you this morning"))
    # the template ends the answer before the model did, and its words are letters in a prompt
    assert first and list(begun.values()) == [0, kept]


def test_an_answer_that_is_stopped_stays_as_far_as_it_came(loaded, ready):
    conversation = Conversation(loaded, ready, new_tokens=80)
    answer = conversation.ask("hello")
    pieces = [next(answer) for _ in range(3)]
    answer.close()
    (turn,) = conversation.turns
    assert turn == ("hello", "".join(pieces)) and not conversation.cut
    assert ready.loop.state().slots_used == 0
    whole = expected(loaded, ready, ["hello"], 80)
    assert whole.startswith(turn.answer) and whole != turn.answer
    # a question without an answer is no turn
    conversation.ask("hm").close()
    assert conversation.turns == [turn]
    assert "".join(conversation.ask("and")) == expected(
        loaded, ready, ["hello", turn.answer, "and"], 80
    )


def test_an_end_token_ends_an_answer_and_is_no_text(loaded, ready):
    ids = loaded.encode("hello")
    third = [step.token for step in ready.dense.generate(ids, 3)][-1]
    loaded.model.generation_config.eos_token_id = third
    conversation = Conversation(loaded, ready, new_tokens=6)
    assert "".join(conversation.ask("hello")) == decoded(loaded, ready, ids, 2)
    assert conversation.last.tokens == 3 and not conversation.cut


def test_answers_longer_than_the_room_leave_some_to_the_history(loaded, ready):
    conversation = Conversation(loaded, ready, new_tokens=10_000)
    assert len(conversation.turns) == 0
    next(answer := conversation.ask("hello"))
    answer.close()
    "".join(conversation.ask("and"))
    assert [turn.question for turn in conversation.turns] == ["hello", "and"]
    assert conversation.cut and conversation.last.tokens > 0.5 * conversation.room


def test_the_oldest_turns_make_room(loaded, ready):
    conversation = Conversation(loaded, ready, new_tokens=2)
    conversation.instruct("sys")
    forgotten = []
    for number in range(12):
        list(conversation.ask(f"ask {number}"))
        forgotten.append(conversation.forgotten)
    # several at a time, so that the beginning stays for a while
    assert max(forgotten) > 1 and forgotten.count(0) > sum(map(bool, forgotten))
    assert len(conversation.turns) == 12 - sum(forgotten)
    turns = list(conversation.turns)
    assert turns[-1].question == "ask 11"
    with pytest.raises(InputError, match=r"takes 1007 tokens.*--max-length"):
        conversation.ask("x" * 1002)
    assert conversation.turns == turns
    # alone it has room for a shorter answer
    room = conversation.room
    assert "".join(conversation.ask("x" * (room - 6))) == expected(
        loaded, ready, ["sys", "x" * (room - 6)], 1
    )
    assert not conversation.turns[:-1] and conversation.last.tokens == 1


def test_without_a_template_it_is_one_text(loaded, ready):
    loaded.tokenizer.chat_template = None
    conversation = Conversation(loaded, ready, new_tokens=6)
    first = "".join(conversation.ask("hello"))
    ids = loaded.encode("hello", raw=True)
    assert first == decoded(loaded, ready, ids, 6)
    ids = loaded.encode(f"hello{first}\nand", raw=True)
    assert "".join(conversation.ask("and")) == decoded(loaded, ready, ids, 6)
    with pytest.raises(InputError, match="wants a chat template"):
        conversation.instruct("be brief")


def test_a_template_without_system_messages_says_so(loaded, ready):
    loaded.tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
        "{% endif %}{{ m.content }}_{% endfor %}"
    )
    conversation = Conversation(loaded, ready, new_tokens=6)
    with pytest.raises(InputError, match="no system"):
        conversation.instruct("be brief")
    assert conversation.system == ""
    assert "".join(conversation.ask("hello"))


def test_what_answers_took(loaded, ready):
    ready.record(dense=True)
    conversation = Conversation(loaded, ready, 12, Sampling(temperature=1.0, seed=3))
    list(conversation.ask("hello"))
    first = conversation.last
    assert (first.tokens, first.following, first.passes) == (12, 11, 11)
    assert first.accepted_per_pass == 1
    list(conversation.ask("and"))
    assert conversation.all == first + conversation.last
    assert conversation.all.tokens == 24 and conversation.all.seconds > first.seconds > 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    return save_word_model(path, artifact=False, max_position_embeddings=4096)


OPTIONS = ("--dtype", "fp32", "--max-new-tokens")


def piped(folder, lines, *options):
    return run("chat", folder, *OPTIONS, 8, *options, typed="".join(f"{line}\n" for line in lines))


def test_lines_of_a_pipe_are_answered(folder, monkeypatch):
    monkeypatch.setattr("eepass.early_exit_model._cpu_compiler", AsTraced)
    code, said, errors = piped(folder, ["w5 w9", "", "/stats", "w7", "/nothing", "/exit", "w8"])
    assert code == 0, errors
    said = said.splitlines()
    _, first, _ = run("generate", folder, "--prompt", "w5 w9", *OPTIONS, 8)
    assert len(said) == 2 and said[0] == first.strip()
    _, second, _ = run("generate", folder, "--prompt", f"w5 w9{said[0]} w7", *OPTIONS, 8)
    assert said[1] == second.strip()
    assert "no chat template: text goes to it as it is" in " ".join(errors.split())
    assert re.search(r"last answer: +8 tokens, \d\.\d\d a pass, [\d.]+ tokens/s", errors)
    assert "/nothing is no command: /help lists them" in errors


def test_what_cannot_be_answered_is_refused(folder, monkeypatch):
    monkeypatch.setattr("eepass.early_exit_model._cpu_compiler", AsTraced)
    code, said, errors = piped(folder, ["w5", "w5 " * 99, "w6"], "--max-length", "64")
    assert code == 2 and len(said.splitlines()) == 1
    assert "error: this message takes" in errors
    assert "temperature" in refused("chat", folder, "--temperature", 1e-9)
    assert "wants a chat template" in refused("chat", folder, "--system", "be brief")


def test_commands(loaded, ready, capsys, monkeypatch):
    conversation = Conversation(loaded, ready, new_tokens=2)
    session = Session(conversation, interactive=True)
    for line in ("/system be brief", "hello", " /stats ", "/help", "/nothing here"):
        session.handle(line)
    said = capsys.readouterr().out
    assert conversation.system == "be brief" and conversation.turns[0].question == "hello"
    assert said.startswith(conversation.turns[0].answer + "\n") and "last answer:   2 tok" in said
    assert all(command in said for command in ("/stats", "/clear", "/system", "/help", "/exit"))
    for number in range(9):
        session.handle(f"and {number}")
    assert re.search(r"the oldest turns \(\d\) are forgotten", capsys.readouterr().out)
    session.handle("/clear")
    session.handle("/system")
    assert conversation.turns == [] and conversation.system == ""
    with pytest.raises(EOFError):
        session.handle("/exit")
    # what a terminal would obey
    monkeypatch.setattr(conversation, "ask", lambda _: (part for part in ("a\x1b]0;b", "\tc\n")))
    session.handle("hello")
    assert "a]0;b\tc\n" in capsys.readouterr().out


class Terminal:
    """``eepass`` in a terminal of 80 columns; nothing is compiled."""

    PROGRAM = (
        "import eepass.early_exit_model as made, models; made._cpu_compiler = models.AsTraced\n"
        "from eepass.cli.main import main; main()"
    )

    def __init__(self, *arguments):
        self.main, other = pty.openpty()
        termios.tcsetwinsize(other, (24, 80))
        path = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
        environment = {**os.environ, "TERM": "xterm", "PYTHONPATH": path}
        environment.pop("COLUMNS", None)
        self.process = subprocess.Popen(
            [sys.executable, "-c", self.PROGRAM, *map(str, arguments)], cwd=ROOT,
            stdin=other, stdout=other, stderr=other, start_new_session=True, env=environment,
            preexec_fn=self._take,
        )  # fmt: skip
        os.close(other)
        self.screen = ""

    @staticmethod
    def _take():
        # so that Ctrl-C is a signal; a test run in the background ignores it
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    def type(self, text):
        self.screen = ""
        os.write(self.main, text.encode())

    def interrupt(self):
        # a signal that comes while readline reads a key is seen at the next key
        time.sleep(0.5)
        self.type("\x03")

    def until(self, pattern):
        """The screen since something was typed, when ``pattern`` has appeared on it."""
        while not re.search(pattern, self.screen):
            assert select.select([self.main], [], [], 120)[0], self.screen
            self.screen += os.read(self.main, 4096).decode(errors="replace")
        return self.screen

    def end(self):
        try:
            return self.process.wait(timeout=60)
        finally:
            self.process.kill()
            os.close(self.main)


def test_a_conversation_in_a_terminal(folder):
    # a token a pass: there is time to stop it
    longest = ("--dense", "--max-length", 4096, "--max-new-tokens", 4000)
    terminal = Terminal("chat", folder, "--dtype", "fp32", *longest)
    shown = " ".join(terminal.until(PROMPT).split())
    assert "room for 4096 tokens" in shown and "no chat template" in shown
    terminal.type("w5 w9\n")
    terminal.until(r"w\d+ w\d+ w\d+")
    terminal.type("\x03")
    assert "Ctrl-C again ends" in terminal.until(PROMPT)
    terminal.type("/stats\n")
    figures = terminal.until(r"conversation: .*tokens/s[^>]*" + PROMPT)
    assert 0 < int(re.search(r"last answer: +(\d+) tokens", figures)[1]) < 4000
    terminal.type("/help\n")
    shown = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", terminal.until(r"/exit[^>]*" + PROMPT))
    lines = shown.splitlines()
    # as the first line has what was typed and the last one the prompt: none is folded
    assert len(lines) == 7 and all(line.startswith("/") for line in lines[:-1])
    # a Ctrl-C drops what was typed, and a line in between makes the next one the first again
    terminal.type("w7 w8")
    terminal.until("w7 w8")
    terminal.interrupt()
    assert "Ctrl-C again ends" in terminal.until(PROMPT)
    terminal.type("/clear\n")
    terminal.until(PROMPT)
    terminal.interrupt()
    terminal.until(PROMPT)
    terminal.interrupt()
    assert terminal.end() == 0


def test_ctrl_d_ends_it(folder):
    terminal = Terminal("chat", folder, "--dtype", "fp32", "--max-new-tokens", 4)
    terminal.until(PROMPT)
    terminal.type("w5 w9\n")
    assert "cut here" in terminal.until(r"w\d+ w\d+ w\d+ w\d+[^>]*" + PROMPT)
    terminal.type("\x04")
    assert terminal.end() == 0
