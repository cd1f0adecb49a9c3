"""Text to tokens and back as transformers' fast tokenizers do, by ``tokenizers`` and ``jinja2``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from eepass.errors import InputError, explained
from eepass.reading import parse_json

FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


class FolderTokenizer:
    """The tokenizer in ``folder``, as transformers' ``save_pretrained`` writes it."""

    def __init__(self, folder: Path, files: Mapping[str, bytes] | None = None) -> None:
        """``files``: the contents of those of ``FILES`` that count; by default all that are
        there."""
        try:
            if files is None:
                files = {f: (folder / f).read_bytes() for f in FILES if (folder / f).is_file()}
            self._tokenizer = Tokenizer.from_str(files[FILES[0]].decode())
            config = parse_json(files[FILES[1]])
            if not isinstance(config, dict):
                raise ValueError(f"{FILES[1]} is no JSON object")
            text = files.get(FILES[2], b"").decode()
        except KeyError as error:
            raise InputError(
                f"{folder}: its tokenizer cannot be read ({error.args[0]} is missing)"
            ) from error
        except Exception as error:  # tokenizers raises plain Exception
            raise InputError(f"{folder}: its tokenizer cannot be read ({error})") from error
        self.files = files
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.chat_template: str | None = text or config.get("chat_template")
        self._special = _special_tokens(config)

    @property
    def eos_token_id(self) -> int | None:
        token = self._special.get("eos_token")
        return None if token is None else self._tokenizer.token_to_id(token)

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": self._tokenizer.encode(text).ids}

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, str]],
        add_generation_prompt: bool = False,
        return_dict: bool = False,
    ) -> list[int]:
        """Token ids of a conversation in the model's template."""
        if self.chat_template is None:
            raise InputError("this model has no chat template: give the prompt raw")
        text = _compiled(self.chat_template).render(
            messages=messages, add_generation_prompt=add_generation_prompt,
            tools=None, documents=None, **self._special,
        )  # fmt: skip
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))


def encode(tokenizer: Any, prompt: str, raw: bool = False) -> list[int]:
    """Token ids of a prompt, in the chat template unless ``raw`` or there is none."""
    if not prompt.strip():
        raise InputError("the prompt is empty: give some text")
    if not raw and getattr(tokenizer, "chat_template", None):
        return encode_messages(tokenizer, [{"role": "user", "content": prompt}])
    _refuse_bytes(prompt)
    return list(tokenizer(prompt)["input_ids"])


def encode_messages(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Token ids of a conversation in the chat template, up to where the next answer begins."""
    for message in messages:
        _refuse_bytes(message["content"])
    with explained("the model's chat template fails; give the prompt raw (--raw)"):
        return list(
            tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        )


def _refuse_bytes(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        # what the command line was given is not UTF-8, or a JSON escape is half a character
        raise InputError("the prompt is no text: some of its bytes are not UTF-8") from None


def write_tokenizer(loaded: Any, folder: Path) -> None:
    """Write the tokenizer of ``loaded`` to ``folder`` as ``FolderTokenizer`` reads it; raises
    ``InputError`` where it does more than those files describe."""
    tokenizer = loaded.tokenizer
    if isinstance(tokenizer, FolderTokenizer):
        for name, data in tokenizer.files.items():
            (folder / name).write_bytes(data)
        return
    tokenizer.save_pretrained(folder)
    for stray in folder.iterdir():
        if stray.name not in FILES:
            stray.unlink()
    if not (folder / FILES[0]).exists():
        raise InputError(f"{loaded.name}: its tokenizer has no fast form (tokenizer.json)")
    own = replace(loaded, tokenizer=FolderTokenizer(folder))
    for prompt in ("Why is the sea salty?", " 3+4=7\n\n\tTaxi, naïve «Ελλάδα» 你好"):
        for raw in (True, False):
            ids = loaded.encode(prompt, raw)
            text = tokenizer.decode(ids, skip_special_tokens=True)
            if own.encode(prompt, raw) != ids or own.tokenizer.decode(ids, True) != text:
                raise InputError(
                    f"{loaded.name}: its tokenizer does more than tokenizer.json and the chat "
                    "template describe, and would not be the same without transformers"
                )


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    tokens = {name: value for name, value in config.items() if name.endswith("_token") and value}
    texts = {n: t.get("content") if isinstance(t, dict) else t for n, t in tokens.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _compiled(template: str) -> Any:
    from jinja2 import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def to_json(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)
