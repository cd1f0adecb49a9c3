"""Greedy answers of eepass, transformers and llama.cpp: plain and alone, then in other ways."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

import eepass
from eepass.benchmark.baselines import LlamaCpp
from eepass.checkpoints.models import LoadedModel
from eepass.config import ExitConfig
from eepass.lengths import usual_length
from eepass.runtime.engine.batch import Request
from eepass.runtime.sampling import GREEDY

# requests at once, where it is several
TOGETHER = 8
# draft tokens of a look-up, as transformers' documentation has it, and of a model
LOOK_UP_TOKENS, ASSISTANT_TOKENS = 10, 4


class Answers(NamedTuple):
    """Tokens by prompt, and passes of the model where they were counted."""

    tokens: list[list[int]]
    passes: int | None = None


Prompts = Sequence[list[int]]
Ways = Iterator[tuple[str, Answers]]


def eepass_answers(loaded: LoadedModel, prompts: Prompts, new_tokens: int) -> Ways:
    """Every mechanism in every pass, whether it pays or not."""
    room = TOGETHER * (max(map(len, prompts)) + new_tokens)
    model = eepass.transform(
        loaded.model, loaded.artifact, max_length=usual_length(loaded.model, room)
    )

    def answers(config: ExitConfig | None, together: int = 1, shares: bool = False) -> Answers:
        model.configure(config, dense=config is None)
        requests = [Request(ids, new_tokens, loaded.stop, GREEDY, shares) for ids in prompts]
        found: dict[Request, list[int]] = {request: [] for request in requests}
        for begin in range(0, len(requests), together):
            for request, token in model.loop.submit(requests[begin : begin + together]):
                found[request].append(token)
        # with those of the prompts, which are not among them
        return Answers(list(found.values()), model.statistics.passes + len(requests))

    everything = ExitConfig(adaptive=False, remember=False)
    drafts = replace(everything, exits=False)
    yield "dense, alone", answers(None)
    yield "dense, once more", answers(None)
    yield "drafts of the text", answers(replace(drafts, speculate="suffix"))
    yield "drafts of the head and the text", answers(drafts)
    yield "drafts and exits", answers(everything)
    yield "dense, common beginnings kept", answers(None, shares=True)
    yield f"dense, {TOGETHER} together", answers(None, TOGETHER)
    yield (
        f"drafts, exits, {TOGETHER} together, beginnings kept",
        answers(everything, TOGETHER, shares=True),
    )


def transformers_answers(loaded: LoadedModel, prompts: Prompts, new_tokens: int) -> Ways:
    model, layers = loaded.model, loaded.model.config.num_hidden_layers
    stop = sorted(loaded.stop)
    usual = {"do_sample": False, "max_new_tokens": new_tokens, "eos_token_id": stop}
    passes = 0

    def count(*_: Any) -> None:
        nonlocal passes
        # its first layers alone are a draft's
        passes += model.config.num_hidden_layers == layers

    def answers(together: int = 1, **options: Any) -> Answers:
        nonlocal passes
        passes, found = 0, []
        for begin in range(0, len(prompts), together):
            batch = prompts[begin : begin + together]
            width = max(map(len, batch))
            padding = [width - len(ids) for ids in batch]
            rows = [[stop[0]] * pad + ids for pad, ids in zip(padding, batch, strict=True)]
            mask = [[0] * pad + [1] * (width - pad) for pad in padding]
            said = model.generate(
                torch.tensor(rows), attention_mask=torch.tensor(mask), pad_token_id=stop[0],
                **usual, **options,
            )  # fmt: skip
            found += [_ended(row, loaded.stop) for row in said[:, width:].tolist()]
        return Answers(found, passes)

    model.generation_config.num_assistant_tokens = ASSISTANT_TOKENS
    hook = model.register_forward_pre_hook(count)
    try:
        yield "greedy, alone", answers()
        yield "greedy, once more", answers()
        yield "prompt look-up", answers(prompt_lookup_num_tokens=LOOK_UP_TOKENS)
        yield "assisted by its own first half", answers(assistant_early_exit=layers // 2)
        yield "assisted by a small random model", answers(assistant_model=_small(model))
        yield f"{TOGETHER} together, padded", answers(TOGETHER)
    finally:
        hook.remove()


def _small(model: Any) -> Any:
    """A model of the same vocabulary, two layers, random: its drafts are wrong."""
    config = deepcopy(model.config)
    config.num_hidden_layers = 2
    torch.manual_seed(0)
    small = type(model)(config).to(next(model.parameters()).dtype).eval()
    small.generation_config = deepcopy(model.generation_config)
    return small


def _ended(tokens: list[int], stop: frozenset[int]) -> list[int]:
    ends = [place for place, token in enumerate(tokens) if token in stop]
    return tokens[: ends[0] + 1] if ends else tokens


def llama_answers(
    file: Path, prompts: Prompts, new_tokens: int, stop: frozenset[int], context: int
) -> Ways:
    def answers(keep: bool = False, **options: Any) -> Answers:
        system = LlamaCpp(file, torch.get_num_threads(), context, **options)
        llama, found, passes = system.llama, [], 0
        run = llama.eval

        def counted(tokens: Sequence[int]) -> None:
            nonlocal passes
            passes += 1
            run(tokens)

        llama.eval = counted
        for ids in prompts:
            if not keep:
                # what a prompt has in common with the last one is run again
                llama.reset()
            found.append(list(system.tokens(ids, new_tokens, stop)))
        llama.close()
        return Answers(found, passes)

    yield "greedy, alone", answers()
    yield "greedy, once more", answers()
    yield "common beginnings kept", answers(keep=True)
    yield "logits of every token kept", answers(all_logits=True)
    yield "prompt look-up", answers(look_up=True)
