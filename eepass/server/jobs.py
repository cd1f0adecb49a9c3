"""A body as requests to the engine: token ids, limits and sampling."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from eepass.errors import InputError
from eepass.runtime.engine.batch import Request
from eepass.runtime.sampling import Sampling
from eepass.server.answers import Answer
from eepass.server.options import ServerOptions
from eepass.server.processing import Processing
from eepass.server.protocol import (
    MOST_CHOICES,
    Body,
    ChatBody,
    CompletionBody,
    Message,
    ResponsesBody,
)
from eepass.server.refusals import Refused
from eepass.server.served import ServedModel

# of a completion that names none, as OpenAI has it
COMPLETION_TOKENS = 16
Prompt = list[int]


@dataclass(frozen=True, slots=True)
class Job:
    """What one body asks for: ``answers`` are its choices, in order."""

    answers: list[Answer]
    prompt_tokens: int

    @property
    def requests(self) -> list[Request]:
        return [answer.request for answer in self.answers]

    @property
    def answer_tokens(self) -> int:
        return sum(answer.tokens for answer in self.answers)


def make_job(body: Body, model: ServedModel, options: ServerOptions) -> Job:
    """Tokenise ``body``; ``Refused`` for what is too long, or cannot be honoured."""
    if body.model is not None and body.model != model.name:
        message = f"model {body.model!r} is not served here; this is {model.name!r}"
        raise Refused(404, message, "model", "model_not_found")
    field, prompts = _prompts(body, model)
    choices = getattr(body, "n", None) or 1
    if len(prompts) * choices > MOST_CHOICES:
        raise Refused(400, f"{field}: prompts times n may be {MOST_CHOICES} at most", field)
    top, bias = _logprobs(body), _bias(body, model)
    exact_only = {name: getattr(body, name, None) for name in PROCESSED}
    if any(exact_only.values()) and not model.is_exact:
        name = next(name for name, value in exact_only.items() if value)
        raise Refused(400, f"{name}: wants guarantee='exact', which this server has not", name)
    answers: list[Answer] = []
    for prompt in prompts:
        limit = _limit(body, len(prompt), field, model, options)
        for choice in range(choices):
            processing = Processing(
                len(prompt), getattr(body, "frequency_penalty", None) or 0.0,
                getattr(body, "presence_penalty", None) or 0.0, bias, top,
            )  # fmt: skip
            stop = frozenset[int]() if body.ignore_eos else model.stop
            request = Request(
                prompt, limit, stop, _sampling(body, choice, processing), options.share_prefixes
            )
            stops = getattr(body, "stop", None) or ()
            answers.append(Answer(len(answers), request, processing, model.decode, stops))
    return Job(answers, sum(map(len, prompts)))


# what needs all logits of a token
PROCESSED = (
    "logit_bias", "frequency_penalty", "presence_penalty", "logprobs", "repetition_penalty",
)  # fmt: skip


def _prompts(body: Body, model: ServedModel) -> tuple[str, list[Prompt]]:
    """The field that holds the prompts, and their token ids."""
    if isinstance(body, CompletionBody):
        prompts: list[str | Prompt] = body.prompt
        if not prompts or not all(isinstance(p, list) or p.strip() for p in prompts):
            raise Refused(400, "prompt: it is empty; give some text", "prompt")
        if len(prompts) > MOST_CHOICES:
            raise Refused(400, f"prompt: {len(prompts)}, and {MOST_CHOICES} at most", "prompt")
        return "prompt", [_ids(prompt, model) for prompt in prompts]
    if isinstance(body, ChatBody):
        field, messages = "messages", [_message(one) for one in body.messages]
    else:
        field, messages = "input", _input_messages(body)
    if not any(message["content"].strip() for message in messages):
        raise Refused(400, f"{field}: there is no text in it", field)
    try:
        return field, [model.chat(messages)]
    except InputError as error:
        raise Refused(400, str(error), field) from None


def _ids(prompt: str | list[int], model: ServedModel) -> Prompt:
    ids = model.encode(prompt) if isinstance(prompt, str) else prompt
    if not ids:
        raise Refused(400, "prompt: it is empty; give at least one token", "prompt")
    if not all(0 <= token < model.vocabulary for token in ids):
        message = f"prompt: token ids are from 0 to {model.vocabulary - 1}"
        raise Refused(400, message, "prompt")
    return ids


def _message(message: Message) -> dict[str, str]:
    # models know no developers
    role = "system" if message.role == "developer" else message.role
    return {"role": role, "content": message.content}


def _input_messages(body: ResponsesBody) -> list[dict[str, str]]:
    given = [_message(one) for one in body.input]
    if body.instructions is None:
        return given
    return [{"role": "system", "content": body.instructions}, *given]


def _limit(body: Body, prompt: int, field: str, model: ServedModel, options: ServerOptions) -> int:
    """Tokens the answer may have; ``Refused`` where prompt or answer is too long."""
    longest = min(options.max_prompt_tokens or model.longest, model.longest - 1)
    if prompt > longest:
        message = f"{field}: {prompt} tokens, and {longest} at most; shorten it"
        raise Refused(400, message, field, "context_length_exceeded")
    name, asked = _asked(body)
    room = model.longest - prompt
    if asked is None:
        usual = COMPLETION_TOKENS if isinstance(body, CompletionBody) else options.max_answer_tokens
        return min(usual, options.max_answer_tokens, room)
    if asked > options.max_answer_tokens:
        message = f"{name}={asked}: an answer has {options.max_answer_tokens} tokens at most"
        raise Refused(400, message, name)
    if asked > room:
        message = (
            f"{name}={asked}: with a prompt of {prompt} tokens there is room for {room}; shorten "
            "the prompt or ask for fewer"
        )
        raise Refused(400, message, name, "context_length_exceeded")
    return asked


def _asked(body: Body) -> tuple[str, int | None]:
    if isinstance(body, ResponsesBody):
        return "max_output_tokens", body.max_output_tokens
    if isinstance(body, ChatBody) and body.max_completion_tokens is not None:
        if body.max_tokens not in (None, body.max_completion_tokens):
            message = "max_tokens: differs from max_completion_tokens; leave it out"
            raise Refused(400, message, "max_tokens")
        return "max_completion_tokens", body.max_completion_tokens
    return "max_tokens", body.max_tokens


def _sampling(body: Body, choice: int, processing: Processing) -> Sampling:
    """Greedy unless a temperature or ``top_p`` is given; choices differ by their seeds."""
    temperature = body.temperature
    if temperature is None:
        temperature = 1.0 if (body.top_p or 1.0) < 1 else 0.0
    seed = None if body.seed is None else (body.seed + choice) % 2**63
    try:
        return Sampling(
            temperature, body.top_k or 0, 1.0 if body.top_p is None else body.top_p,
            body.min_p or 0.0, body.repetition_penalty or 1.0, seed,
            None if processing.changes_nothing else processing,
        )  # fmt: skip
    except ValueError as error:
        raise Refused(400, str(error), str(error).partition("=")[0]) from None


def _logprobs(body: Body) -> int | None:
    """How many of the most probable tokens go with each token; None for no log-probabilities."""
    if isinstance(body, CompletionBody):
        return body.logprobs
    if not isinstance(body, ChatBody):
        return None
    if body.top_logprobs and not body.logprobs:
        raise Refused(400, "top_logprobs: wants logprobs=true", "top_logprobs")
    return (body.top_logprobs or 0) if body.logprobs else None


def _bias(body: Body, model: ServedModel) -> Mapping[int, float]:
    found = {}
    for token, value in (getattr(body, "logit_bias", None) or {}).items():
        if not (token.isascii() and token.isdecimal() and int(token) < model.vocabulary):
            message = f"logit_bias: token ids are from 0 to {model.vocabulary - 1}"
            raise Refused(400, message, "logit_bias")
        found[int(token)] = value
    return found
