"""The bodies of requests: what is honoured, what changes nothing, and what is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field, ValidationError
from pydantic_core import from_json

from eepass.server.refusals import Refused

MOST_STOPS, LONGEST_STOP = 16, 1000
# answers to one request: prompts times ``n``
MOST_CHOICES = 16
MOST_BIASES = 1024
TEXT_PARTS = ("text", "input_text", "output_text")
# what says who asks, or what to do with an answer that this server does not keep
IGNORED = frozenset({
    "metadata", "prompt_cache_key", "prompt_cache_retention", "safety_identifier", "service_tier",
    "store", "user", "verbosity",
})  # fmt: skip
NONE: tuple[Any, ...] = (None,)
# by field what it may be, as if it were not there: anything else would change the answer
NO_TOOLS: dict[str, tuple[Any, ...]] = {
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "parallel_tool_calls": (None, False, True),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
}


def _text(value: Any) -> Any:
    """The text of a message's content, which may be a list of parts."""
    if isinstance(value, list):
        for part in value:
            if not isinstance(part, dict) or part.get("type") not in TEXT_PARTS:
                raise ValueError("this server reads parts of type text, and no other parts")
            if not isinstance(part.get("text"), str):
                raise ValueError("a part of type text has its text under 'text'")
        return "".join(part["text"] for part in value)
    return value


def _stops(value: Any) -> Any:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(one, str) for one in stops):
        raise ValueError("a text, or a list of texts")
    if len(stops) > MOST_STOPS:
        raise ValueError(f"{len(stops)} stop strings: at most {MOST_STOPS}")
    if not all(0 < len(one) <= LONGEST_STOP for one in stops):
        raise ValueError(f"a stop string has 1 to {LONGEST_STOP} characters")
    return stops


def _prompts(value: Any) -> Any:
    """Texts or lists of token ids, in a list."""
    alone = isinstance(value, str) or (isinstance(value, list) and _is_ids(value))
    prompts = [value] if alone else value
    if not isinstance(prompts, list) or not all(isinstance(p, str) or _is_ids(p) for p in prompts):
        raise ValueError("a text, a list of token ids, or a list of such")
    return prompts


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(one) is int for one in value)


def _messages(value: Any) -> Any:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


Text = Annotated[str, BeforeValidator(_text)]


class _Body(BaseModel):
    model_config = ConfigDict(
        strict=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True
    )
    without: ClassVar[Mapping[str, tuple[Any, ...]]] = {}


class Message(_Body):
    """One message of a conversation; its text alone is read."""

    without = {
        "tool_calls": (None, []), "tool_call_id": NONE, "function_call": NONE, "refusal": NONE,
        "audio": NONE, "name": NONE,
    }  # fmt: skip
    role: Literal["system", "developer", "user", "assistant"]
    content: Text


class InputMessage(Message):
    """A message as ``/v1/responses`` has it: answers may be given back as they were returned."""

    type: Literal["message"] = "message"
    id: str | None = None
    status: str | None = None


class StreamOptions(_Body):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Generation(_Body):
    """What all three kinds of request may say."""

    model: str | None = None
    stream: bool | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    # as vLLM and llama.cpp have them
    top_k: int | None = Field(None, ge=0)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    seed: int | None = Field(None, ge=0, lt=2**63)
    ignore_eos: bool | None = None


class _WithChoices(Generation):
    n: int | None = Field(None, ge=1, le=MOST_CHOICES)
    stop: Annotated[list[str], BeforeValidator(_stops)] | None = None
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(
        None, max_length=MOST_BIASES
    )
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)


class ChatBody(_WithChoices):
    """``/v1/chat/completions``"""

    without = {
        **NO_TOOLS, "response_format": (None, {"type": "text"}), "modalities": (None, ["text"]),
        "audio": NONE, "prediction": NONE, "reasoning_effort": NONE, "web_search_options": NONE,
    }  # fmt: skip
    messages: Annotated[list[Message], FailFast()] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)


class CompletionBody(_WithChoices):
    """``/v1/completions``"""

    without = {"best_of": (None, 1), "echo": (None, False), "suffix": (None, "")}
    prompt: Annotated[Any, BeforeValidator(_prompts)]
    logprobs: int | None = Field(None, ge=0, le=5)


class ResponsesBody(Generation):
    """``/v1/responses``"""

    without = {
        **NO_TOOLS, "background": (None, False), "conversation": NONE, "include": (None, []),
        "max_tool_calls": NONE, "previous_response_id": NONE, "prompt": NONE, "reasoning": NONE,
        "text": (None, {}, {"format": {"type": "text"}}), "top_logprobs": (None, 0),
        "truncation": (None, "disabled"),
    }  # fmt: skip
    input: Annotated[list[InputMessage], FailFast(), BeforeValidator(_messages)]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)


Body = ChatBody | CompletionBody | ResponsesBody
B = TypeVar("B", ChatBody, CompletionBody, ResponsesBody)


def read_body(kind: type[B], data: bytes) -> B:
    """The request in ``data``; ``Refused`` with status 400 for what is none, naming the field."""
    try:
        values = from_json(data, allow_inf_nan=False)
    except ValueError as error:
        raise Refused(400, f"the body is no JSON: {error}") from None
    if not isinstance(values, dict):
        raise Refused(400, "the body must be a JSON object")
    _drop(kind, values, "")
    for field in ("messages", "input"):
        entries = values.get(field)
        for number, entry in enumerate(entries if isinstance(entries, list) else ()):
            if isinstance(entry, dict):
                _drop(InputMessage, entry, f"{field}.{number}.")
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise _refusal(error) from None


def _drop(kind: type[_Body], values: dict[str, Any], place: str) -> None:
    """Remove the fields that change nothing; ``Refused`` for those that would and cannot."""
    for name in IGNORED & values.keys():
        del values[name]
    for name, neutral in kind.without.items():
        if values.pop(name, None) not in neutral:
            what = "tools are not supported" if name in NO_TOOLS else "not supported here"
            raise Refused(400, f"{place}{name}: {what}; leave it out", f"{place}{name}")


def _refusal(error: ValidationError) -> Refused:
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    # after the field and the numbers of list entries come names of pydantic's own
    known = [*ChatBody.model_fields, *CompletionBody.model_fields, *ResponsesBody.model_fields]
    known += [*InputMessage.model_fields, *StreamOptions.model_fields]
    kind, path = first["type"], list(first["loc"])
    if kind != "extra_forbidden":
        path = [part for part in path if isinstance(part, int) or part in known]
    param = ".".join(map(str, path)) or None
    said = first["msg"].removeprefix("Value error, ")
    if kind == "extra_forbidden":
        said = "no such field; leave it out"
    elif kind in ("missing", "too_short"):
        said = "missing" if kind == "missing" else "it is empty"
    return Refused(400, f"{param or 'the body'}: {said}", param)
