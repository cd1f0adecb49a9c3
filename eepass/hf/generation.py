"""``eepass.generate``, which ``model.generate(custom_generate=eepass.generate)`` calls, and
``eepass.prepare``, after which ``model.generate`` calls it by itself."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from transformers import (
    EosTokenCriteria,
    GenerationMixin,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteriaList,
)
from transformers.generation import GenerateDecoderOnlyOutput, GenerationMode

from eepass.checkpoints.artifact import Artifact
from eepass.config import ExitConfig
from eepass.errors import InputError
from eepass.hf.logits_processing import (
    RowProcessors,
    kept_by_token,
    native_options,
    refuse_processors,
    row_samplings,
)
from eepass.hf.prepared import in_use, register
from eepass.model import EarlyExitModel
from eepass.runtime.engine.batch import Request
from eepass.wrappers import original_inside

# what ``generate`` prepares for the forward call of the model; the engine needs none of it
# what transformers calls the cache that it hands on: from 5.24 on, and before
CACHES = ("cache", "past_key_values")
NOT_NEEDED = {
    *CACHES, "attention_mask", "position_ids", "cache_position", "use_cache",
    "logits_to_keep", "output_attentions", "output_hidden_states", "return_dict",
}  # fmt: skip


def generate(
    model: Any,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: Any,
    streamer: Any = None,
    tokenizer: Any = None,
    assistant_model: Any = None,
    **model_kwargs: Any,
) -> Tensor | GenerateDecoderOnlyOutput:
    """Decode with eepass: ids [B, T] -> [B, T + new], padded on the right where rows end early.

    The model is transformed at its first use; ``eepass.prepare`` says how. Greedy or sampled, with
    logits processors, stopping criteria and streamers, each called once for every token that is
    final. Each row is decoded by itself: processors and criteria see its ids with its padding, one
    row at a time, and its neighbours change nothing. Seeds come from torch's generator, or from a
    ``seed`` of the generation config. Calls of several threads are decoded together.

    transformers hands a callable neither streamer nor tokenizer; ``eepass.prepare(model)`` makes it
    do so, for streaming and stop strings. Raises ``InputError`` for what cannot be honoured, by
    name.
    """
    del tokenizer  # the criterion of stop strings has it
    _refuse_withheld(inspect.currentframe(), streamer, assistant_model)
    _refuse(generation_config, assistant_model, model_kwargs)
    own = _own_tokens(input_ids, model_kwargs)
    padding = input_ids.shape[1] - own.sum(1)
    limit, stop, criteria = _ends(stopping_criteria, input_ids.shape[1])
    pad = _pad_token(generation_config, len(input_ids), bool(stop or criteria))
    prompts = [ids[mask].tolist() for ids, mask in zip(input_ids, own, strict=True)]
    as_dict = generation_config.return_dict_in_generate
    keep = bool(as_dict and (generation_config.output_scores or generation_config.output_logits))

    with in_use(model, max(map(len, prompts)) + limit) as transformed:
        assert transformed.config is not None
        loop, approximate = transformed.loop, transformed.config.guarantee == "approximate"
        shares = transformed.config.remember
    native = native_options(logits_processor, padding)
    refuse_processors(logits_processor, native is not None, approximate)
    if keep and approximate:
        raise InputError("output_scores and output_logits need guarantee='exact'")
    processors: list[RowProcessors] = []
    options: list[dict[str, Any]] = [dict(native or {}) for _ in prompts]
    if native is None or keep:
        leads = [ids[~mask].tolist() for ids, mask in zip(input_ids, own, strict=True)]
        for row, lead in enumerate(leads):
            processors.append(RowProcessors(logits_processor, row, lead, len(leads), keep))
            options[row] = {"process": processors[row]}
    samplings = row_samplings(generation_config, options)
    requests = [
        Request(prompt, limit, stop, sampling, shares)
        for prompt, sampling in zip(prompts, samplings, strict=True)
    ]
    answers = _Answers(input_ids, requests, criteria, streamer, pad)
    with closing(loop.submit(requests)) as steps:
        for request, token in steps:
            answers.add(request, token)
    sequences = answers.sequences()
    if streamer is not None:
        streamer.end()
    if not as_dict:
        return sequences
    result: dict[str, Any] = {"sequences": sequences}
    for name in ("scores", "logits"):
        if keep and getattr(generation_config, f"output_{name}"):
            result[name] = kept_by_token(processors, name, answers.lengths)
    return GenerateDecoderOnlyOutput(**result)


def prepare(
    model: Any,
    artifact: str | Path | Artifact | None = "auto",
    config: ExitConfig | None = None,
    max_length: int | None = None,
) -> EarlyExitModel:
    """Transform ``model`` for its own ``generate``, which uses eepass from here on.

    ``artifact``: a folder written by ``eepass.train``, None for none, ``"auto"`` for the one beside
    the checkpoint or shipped with eepass. ``max_length``: prompt and answer together, in tokens;
    without it the cache is made anew when longer ones come, which compiles again. The result is
    kept as long as the model is; its ``statistics`` tell what decoding did. Of a model that PEFT or
    ``torch.compile`` wraps, it is the model inside that is prepared; their ``generate`` calls that
    one's.
    ``model.generate(..., custom_generate=None)`` is transformers' own way. Raises ``InputError``
    for a model or artefact that does not fit, with the reason.
    """
    model = original_inside(model)
    transformed = register(model, artifact, config or ExitConfig(), max_length)
    # on this model alone: no other one, and no class of transformers, is changed
    model._extract_generation_mode_kwargs = functools.partial(_mode_kwargs, model)
    model.generate = functools.partial(type(model).generate, model, custom_generate=generate)
    return transformed


def _mode_kwargs(
    model: Any, custom_generate: Any, kwargs: dict[str, Any], synced_gpus: Any,
    assistant_model: Any, streamer: Any,
) -> dict[str, Any]:  # fmt: skip
    """What transformers hands to its own decoding methods, for ``eepass.generate`` as well: a
    callable given as ``custom_generate`` gets no streamer, and stop strings find no tokenizer."""
    options = (custom_generate, kwargs, synced_gpus, assistant_model, streamer)
    # read beforehand: transformers takes the tokenizer out of them
    given = {"assistant_model": assistant_model, "streamer": streamer}
    given["tokenizer"] = kwargs.get("tokenizer")
    found: dict[str, Any] = type(model)._extract_generation_mode_kwargs(model, *options)
    if custom_generate is generate:
        found |= {name: value for name, value in given.items() if value is not None}
    return found


def _refuse_withheld(own: FrameType | None, streamer: Any, assistant_model: Any) -> None:
    """Raise ``InputError`` for what transformers' ``generate`` was given and did not hand on.

    It drops a streamer in silence where ``custom_generate`` is a callable; only its own variables
    show that there was one.
    """
    caller = own.f_back if own is not None else None
    if caller is None or caller.f_code is not inspect.unwrap(GenerationMixin.generate).__code__:
        return
    for name, received in (("streamer", streamer), ("assistant_model", assistant_model)):
        if received is None and caller.f_locals.get(name) is not None:
            raise InputError(
                f"{name}: transformers does not hand it to a callable; call eepass.prepare(model) "
                "once, then model.generate(...) without custom_generate"
            )


class _Answers:
    """The tokens of all rows; evaluates the criteria after each, streams what all rows have."""

    def __init__(
        self, input_ids: Tensor, requests: Sequence[Request], criteria: StoppingCriteriaList,
        streamer: Any, pad: int,
    ) -> None:  # fmt: skip
        self.input_ids, self.criteria, self.streamer, self.pad = input_ids, criteria, streamer, pad
        self.requests = list(requests)
        self.new: dict[Request, list[int]] = {request: [] for request in requests}
        self.streamed = 0

    def add(self, request: Request, token: int) -> None:
        new = self.new[request]
        new.append(token)
        ended = token in request.stop or len(new) >= request.limit
        if self.criteria:
            row = self.input_ids[self.requests.index(request)]
            ids = torch.cat([row, row.new_tensor(new)])[None]
            # all of them, since each may count its calls
            met = [_is_met(criterion, ids) for criterion in self.criteria]
            ended = any(met) or ended
        request.enough = ended
        if self.streamer is not None:
            self._stream()

    @property
    def lengths(self) -> list[int]:
        return [len(new) for new in self.new.values()]

    def sequences(self) -> Tensor:
        """Ids [B, T + new] of prompts and answers, padded on the right."""
        longest = max(self.lengths)
        rows = [new + [self.pad] * (longest - len(new)) for new in self.new.values()]
        return torch.cat([self.input_ids, self.input_ids.new_tensor(rows)], 1)

    def _stream(self) -> None:
        """Stream tokens [B] that every row has, with padding for rows that have ended."""
        while any(len(new) > self.streamed for new in self.new.values()) and all(
            len(new) > self.streamed or request.enough for request, new in self.new.items()
        ):
            at = self.streamed
            self.streamed += 1
            column = [new[at] if len(new) > at else self.pad for new in self.new.values()]
            self.streamer.put(torch.tensor(column))


def _is_met(criterion: Any, ids: Tensor) -> bool:
    met = criterion(ids, None)
    if torch.is_tensor(met) and met.numel() != 1:
        raise InputError(
            f"{type(criterion).__name__}: given one row, it returned values for {met.numel()}; "
            "eepass evaluates the criteria row by row"
        )
    return bool(met)


def _ends(criteria: Iterable[Any], width: int) -> tuple[int, frozenset[int], StoppingCriteriaList]:
    """The most new tokens, the end tokens, and the other criteria."""
    limit, stop, others = 1 << 30, frozenset[int](), StoppingCriteriaList()
    for criterion in criteria:
        if type(criterion) is MaxLengthCriteria:
            limit = min(limit, criterion.max_length - width)
        elif type(criterion) is EosTokenCriteria:
            stop |= frozenset(criterion.eos_token_id.reshape(-1).tolist())
        else:
            others.append(criterion)
    if limit == 1 << 30:
        raise InputError("no length is given: set max_new_tokens or max_length")
    return limit, stop, others


def _own_tokens(input_ids: Tensor, model_kwargs: dict[str, Any]) -> Tensor:
    """Which of ids [B, T] are the rows' own and not padding, bool [B, T]."""
    mask = model_kwargs.get("attention_mask")
    own = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask != 0
    if own.shape != input_ids.shape:
        raise InputError(f"attention_mask {list(own.shape)}: must be as input_ids")
    # padding may only come first
    if not own[:, -1].all() or (own.int().diff(dim=1) < 0).any():
        raise InputError(
            "attention_mask: zeros are allowed only on the left of a prompt, as padding; use "
            "padding_side='left'"
        )
    positions = model_kwargs.get("position_ids")
    usual = (own.cumsum(1) - 1).clamp(min=0)
    if positions is not None and not torch.equal(positions[own], usual[own]):
        raise InputError("position_ids: eepass counts positions from 0; leave them out")
    return own


def _pad_token(generation_config: Any, rows: int, may_end_early: bool) -> int:
    pad = getattr(generation_config, "_pad_token_tensor", None)
    if pad is None and rows > 1 and may_end_early:
        raise InputError("pad_token_id: set one, since rows may end at different lengths")
    return 0 if pad is None else int(pad)


def _refuse(generation_config: Any, assistant_model: Any, model_kwargs: dict[str, Any]) -> None:
    """Raise ``InputError`` for what cannot be honoured, and say what to do."""
    mode = generation_config.get_generation_mode(assistant_model)
    if mode == GenerationMode.ASSISTED_GENERATION:
        raise InputError(
            "assistant_model, prompt_lookup_num_tokens: eepass drafts by itself; leave them out"
        )
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise InputError(
            f"{mode.value}: eepass decodes greedily or by sampling; leave out the option for it "
            "(num_beams, penalty_alpha, dola_layers, constraints), or use custom_generate=None"
        )
    if generation_config.return_dict_in_generate:
        for name in ("output_attentions", "output_hidden_states"):
            if getattr(generation_config, name):
                raise InputError(f"{name}: eepass does not keep them; use custom_generate=None")
    if generation_config.cache_implementation == "quantized":
        raise InputError("cache_implementation='quantized': eepass keeps exact keys and values")
    for name in CACHES:
        if getattr(model_kwargs.get(name), "_is_user_defined", False):
            raise InputError(
                f"{name}: eepass has a cache of its own; give the whole text as input_ids"
            )
    given = {name for name, value in model_kwargs.items() if value is not None}
    if unknown := sorted(given - NOT_NEEDED):
        raise InputError(
            f"{', '.join(unknown)}: eepass decodes from input_ids alone; leave them out"
        )
