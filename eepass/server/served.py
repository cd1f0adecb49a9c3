"""The model behind a server: what decodes for it, and its text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from eepass.checkpoints.models import LoadedModel
from eepass.config import ExitConfig
from eepass.early_exit_model import EarlyExitModel
from eepass.errors import InputError, explained
from eepass.hf.prepared import forget_requests, in_use, is_prepared
from eepass.lengths import usual_length
from eepass.model import transform
from eepass.runtime.engine.batch import Request
from eepass.runtime.engine.loop import Tokens
from eepass.runtime.sampling import GREEDY
from eepass.server.options import ServerOptions
from eepass.wrappers import original_inside

WARM_UP_TOKENS = 4
# called from the engine's thread with what ``Tokens`` would have given
Put = Callable[[Any], None]


class ServedModel:
    """``loaded`` made ready to decode many requests together.

    A prepared model decodes as ``eepass.prepare`` said, and is looked at before each request, so
    that a changed adapter is noticed; any other is transformed here. Raises ``InputError`` for what
    cannot be served.
    """

    def __init__(self, loaded: Any, options: ServerOptions) -> None:
        if not isinstance(loaded, LoadedModel):
            raise InputError(f"serve: {type(loaded).__name__} is not what eepass.load returns")
        if not loaded.transformed:
            loaded = replace(loaded, model=original_inside(loaded.model))
        self.loaded, self.name = loaded, options.name or model_id(loaded.name)
        self.stop = loaded.stop
        self._own: EarlyExitModel | None = None
        if not loaded.transformed and is_prepared(loaded.model):
            if options.dense:
                raise InputError("dense: this model decodes as eepass.prepare said; leave it out")
            if not options.remember:
                forget_requests(loaded.model)
        else:
            self._own = _transformed(loaded, options)
        decoder = self.current().decoder
        self.longest = decoder.max_sequence_length
        self.vocabulary = int(decoder.splits[1].head.whole.outputs[0].meta["val"].shape[-1])

    def current(self) -> EarlyExitModel:
        """What decodes; a prepared model that has changed is transformed anew, which takes long."""
        if self._own is not None:
            return self._own
        with in_use(self.loaded.model, 1) as transformed:
            return transformed

    def submit(self, requests: Sequence[Request], put: Put) -> Tokens:
        """Decode ``requests`` with all others; ``put`` gets their tokens."""
        return self.current().loop.submit(requests, put)

    def warm_up(self) -> None:
        """Compile what requests will need, and measure what passes cost."""
        model = self.current()
        loop, most = model.loop, model.loop.engine.step_rows
        prompt = [0] * max(1, self.longest // most - WARM_UP_TOKENS)
        # a long prompt alone first; then as many requests as a pass has rows for
        for ids, count in ((prompt[:64], 1), (prompt[:1], most)):
            requests = [Request(ids, WARM_UP_TOKENS, frozenset(), GREEDY) for _ in range(count)]
            for _ in loop.submit(requests):
                pass

    @property
    def is_exact(self) -> bool:
        config = self.current().config
        return config is None or config.guarantee == "exact"

    def chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of a conversation in the model's chat template."""
        if not self.loaded.converses:
            raise InputError(f"{self.name} has no chat template: use /v1/completions")
        tokenizer = self.loaded.tokenizer
        with explained("messages: the model's chat template refuses them"):
            return list(
                tokenizer.apply_chat_template(
                    messages, add_generation_prompt=True, return_dict=False
                )
            )

    def encode(self, text: str) -> list[int]:
        """Token ids of a text as it is."""
        return list(self.loaded.tokenizer(text)["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, without special ones."""
        return str(self.loaded.tokenizer.decode(list(ids), skip_special_tokens=True))

    def token_text(self, token: int) -> str:
        """The text of one token, whatever it is."""
        return str(self.loaded.tokenizer.decode([token]))


def model_id(name: str) -> str:
    """What clients call the model: no folder of this machine is in it."""
    path = Path(name)
    if path.suffix == ".gguf":
        return path.stem
    # an id of Hugging Face is no path
    if path.is_absolute() or path.exists() or name.count("/") != 1:
        return path.resolve().name
    return name


def _transformed(loaded: LoadedModel, options: ServerOptions) -> EarlyExitModel:
    config = ExitConfig(speculate=options.speculate, remember=options.remember)  # type: ignore[arg-type]
    if loaded.transformed:
        # its cache has the length it was written with
        made = transform(loaded.model, loaded.artifact, config)
    else:
        slots = usual_length(loaded.model, options.cache_tokens)
        made = transform(loaded.model, loaded.artifact, config, slots, loaded.stop)
    if options.dense:
        made.record(dense=True)
    return made
