"""``eepass chat``: a conversation in the terminal, or with the lines of a pipe."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Annotated

import typer

from eepass.cli import options
from eepass.cli.command import command, load_model, transform_model
from eepass.cli.console import console, errors

if TYPE_CHECKING:
    from eepass.conversation import Conversation, Pace

PROMPT = ">>> "
# tokens of a conversation, where --max-length does not say
USUAL_LENGTH = 4096
HELP = """\
/stats        accepted tokens a pass and tokens/s, of the last answer and of all
/clear        forget the conversation
/system TEXT  begin the conversation with this message; without TEXT, with none
/help         this list
/exit         end; so do Ctrl-D and a second Ctrl-C"""
# an answer may contain what a terminal takes for commands
CONTROL = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


@command
def chat(
    model: options.Model,
    artifact: options.ArtifactDir = None,
    drafts_alone: options.DraftsAlone = False,
    quantize: options.Quantize = "keep",
    activations: options.Activations = "int8",
    system: Annotated[str, typer.Option(help="What the model is told first.")] = "",
    max_new_tokens: options.NewTokens = 512,
    max_length: options.MaxLength = None,
    dense: options.Dense = False,
    preset: options.Preset = "default",
    guarantee: options.Guarantee = "exact",
    speculate: options.Speculate = "cascade",
    exits: options.Exits = True,
    adaptive: options.Adaptive = True,
    target_agreement: options.Target = 0.98,
    kv: options.Kv = "defer",
    temperature: options.Temperature = 0.0,
    top_k: options.TopK = 0,
    top_p: options.TopP = 1.0,
    min_p: options.MinP = 0.0,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    seed: options.Seed = None,
    raw: options.Raw = False,
    dtype: options.Dtype = None,
    threads: options.Threads = 0,
    trust_native: options.Trust = False,
    debug: options.Debug = False,
) -> None:
    """Talk with MODEL: a line is a message, /help lists what else there is.

    The history is kept. Ctrl-C stops an answer; what it said so far stays in the history. Where the
    conversation has more than --max-length tokens, its oldest turns are forgotten. Lines of a pipe
    are answered on the output, one after the other.
    """
    from eepass.conversation import Conversation
    from eepass.lengths import usual_length
    from eepass.model import PREFILL_ROWS
    from eepass.runtime.sampling import Sampling

    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    config = options.exit_config(
        preset, guarantee=guarantee, speculate=speculate, exits=exits, adaptive=adaptive,
        target_agreement=target_agreement, kv=kv,
    )  # fmt: skip
    loaded = load_model(model, dtype, threads, trust_native, quantize, activations)
    if max_length is None and not loaded.transformed:
        max_length = usual_length(loaded.model, USUAL_LENGTH)
    ready = transform_model(loaded, artifact, config, max_length, dense, drafts_alone=drafts_alone)
    if dense:
        ready.record(dense=True)
    conversation = Conversation(loaded, ready, max_new_tokens, sampling, raw)
    conversation.instruct(system)
    with console.status("compiling"):
        # here, where Ctrl-C ends it, and not in the first answer
        for _ in ready.stream([0] * min(PREFILL_ROWS, conversation.room - 4), 4):
            pass
    session = Session(conversation, sys.stdin.isatty() and sys.stdout.isatty())
    if not loaded.converses and not raw:
        session.say(f"{loaded.name} has no chat template: text goes to it as it is")
    session.run()


class Session:
    """What the person says, line by line, and what comes of it.

    ``interactive``: in a terminal. Otherwise the output has answers alone, and remarks go to the
    error stream.
    """

    def __init__(self, conversation: Conversation, interactive: bool) -> None:
        self.conversation, self.interactive = conversation, interactive

    def say(self, remark: str) -> None:
        remarks = console if self.interactive else errors
        remarks.print(remark, style="dim", highlight=False, markup=False)

    def run(self) -> None:
        """Returns when the person ends it."""
        if self.interactive:
            self._converse()
        else:
            with suppress(EOFError):
                for line in sys.stdin:
                    self.handle(line)

    def _converse(self) -> None:
        with suppress(ImportError):
            # edits what input reads
            import readline  # noqa: F401
        self.say(
            f"room for {self.conversation.room} tokens of conversation; /help lists commands, "
            "Ctrl-D ends"
        )
        stopped = False
        while True:
            try:
                line = input(PROMPT)
                stopped = False
                self.handle(line)
            except EOFError:
                sys.stdout.write("\n")
                return
            except KeyboardInterrupt:
                sys.stdout.write("\n")
                if stopped:
                    return
                stopped = True
                self.say("Ctrl-C again ends the conversation")
            except ValueError as error:
                errors.print(f"error: {error}", highlight=False, markup=False)

    def handle(self, line: str) -> None:
        """Do what a line says, or answer it. ``EOFError`` where it ends the conversation,
        ``ValueError`` where it cannot be done."""
        name, _, text = line.strip().partition(" ")
        if not name:
            return
        if not name.startswith("/"):
            self._answer(line.strip())
        elif name in self._commands:
            self._commands[name](text.strip())
        else:
            self.say(f"{name} is no command: /help lists them")

    def _answer(self, question: str) -> None:
        conversation = self.conversation
        with closing(conversation.ask(question)) as answer:
            if conversation.forgotten:
                self.say(f"no more room: the oldest turns ({conversation.forgotten}) are forgotten")
            for piece in answer:
                sys.stdout.write(piece.translate(CONTROL) if self.interactive else piece)
                sys.stdout.flush()
        sys.stdout.write("\n")
        if conversation.cut:
            self.say("cut here: --max-new-tokens and --max-length allow longer answers")

    @property
    def _commands(self) -> dict[str, Callable[[str], None]]:
        return {
            "/stats": lambda _: self._show_pace(),
            "/clear": lambda _: self.conversation.clear(),
            "/system": self.conversation.instruct,
            "/help": lambda _: self.say(HELP),
            "/exit": _end,
        }

    def _show_pace(self) -> None:
        last, everything = self.conversation.last, self.conversation.all
        self.say(f"last answer:   {_as_text(last)}\nconversation:  {_as_text(everything)}")


def _as_text(pace: Pace) -> str:
    return (
        f"{pace.tokens} tokens, {pace.accepted_per_pass:.2f} a pass, "
        f"{pace.tokens_per_second:.1f} tokens/s"
    )


def _end(text: str) -> None:
    # as Ctrl-D
    raise EOFError
