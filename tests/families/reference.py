"""What a split decoder must compute: what its model computes eagerly, cut at any layer.

The reference is the eager model over the whole text at once, its list of layers cut after the
layer in question: no graph, no static cache, no compiled code.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from models import ForcedExits
from torch import Tensor, nn

from eepass.runtime.decoder.decoder import Decoder
from eepass.runtime.decoder.side_inputs import Row
from eepass.runtime.engine.engine import Engine
from eepass.runtime.engine.options import Options
from eepass.runtime.exits.exits import ExitDecision, RowState

TEXT = [7, 30, 9, 12, 55, 40, 8, 23, 61, 77, 11, 4, 90, 33, 21, 68, 5, 15]
PROMPT = 12
NEW_TOKENS = 8

# keys and values, or states, of one layer
Memory = tuple[Tensor, ...]


class Reference(Protocol):
    def __call__(self, ids: Sequence[int], depth: int) -> tuple[Tensor, list[Memory]]:
        """Logits [n, V] of the model cut after ``depth`` layers, and what its layers keep."""
        ...


class CutModel:
    """A Hugging Face model as ``Reference``."""

    def __init__(self, model: Any, layers: int) -> None:
        self.models = {layers: model}
        self.layers = layers

    def __call__(self, ids: Sequence[int], depth: int) -> tuple[Tensor, list[Memory]]:
        from transformers import DynamicCache

        if depth not in self.models:
            self.models[depth] = cut(self.models[self.layers], self.layers, depth)
        # a cut may leave recurrent layers alone, which a cache made for them does not expect
        whole = DynamicCache(config=self.models[self.layers].config)
        out = self.models[depth](
            input_ids=torch.tensor([list(ids)]),
            position_ids=torch.arange(len(ids))[None],
            past_key_values=whole if any(whole.is_linear) else None,
            use_cache=True,
        )
        cache = out.past_key_values
        cache = getattr(cache, "self_attention_cache", cache)
        return out.logits[0], [_kept(layer) for layer in cache.layers[:depth]]


def cut(model: Any, layers: int, depth: int) -> Any:
    """A copy of ``model`` whose list of ``layers`` layers ends after ``depth``."""
    shorter = copy.deepcopy(model)
    name = next(
        name
        for name, module in shorter.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == layers
    )
    owner, _, attribute = name.rpartition(".")
    setattr(shorter.get_submodule(owner), attribute, shorter.get_submodule(name)[:depth])
    config = shorter.config
    config.num_hidden_layers = depth
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == layers:
            setattr(config, name, value[:depth])
    return shorter


def _kept(layer: Any) -> Memory:
    states = (getattr(layer, "conv_states", {}), getattr(layer, "recurrent_states", {}))
    found = [getattr(layer, "keys", None), getattr(layer, "values", None)]
    found += [state for group in states for state in group.values()]
    return tuple(tensor for tensor in found if isinstance(tensor, Tensor) and tensor.numel())


def apart(found: Tensor, wanted: Tensor) -> float:
    """Largest difference, as a share of the largest value where that is above one."""
    if found.shape != wanted.shape:
        return float("inf")
    difference = (found - wanted).abs().max() / wanted.abs().max().clamp_min(1.0)
    return float(difference.nan_to_num(float("inf")))


def dense_error(decoder: Decoder, reference: Reference) -> float:
    """How far dense logits are from the eager ones: a prompt in chunks, then token by token."""
    kv = decoder.kv
    first = kv.allocate(decoder.capacity)
    assert first == 0
    logits, chunk = [], decoder.buckets[-1]
    starts = [*range(0, PROMPT, chunk), *range(PROMPT, len(TEXT))]
    for start, end in zip(starts, [*starts[1:], len(TEXT)], strict=True):
        rows = [Row(0, at, at) for at in range(start, min(end, start + chunk))]
        hidden = decoder.forward([TEXT[row.slot] for row in rows], rows, decoder.capacity)
        logits += [decoder.logits(row)[0, 0] for row in hidden.split(1, 1)]
    wanted, kept = reference(TEXT, decoder.num_layers)
    error = max(apart(torch.stack(logits), wanted), memory_error(decoder, kept, len(TEXT)))
    kv.release(first)
    return error


def memory_error(decoder: Decoder, kept: list[Memory], tokens: int) -> float:
    """How far what the first layers keep of ``tokens`` tokens is from what the model keeps."""
    worst = 0.0
    for layer, memory in enumerate(kept):
        kv = decoder.kv
        ours = [t for t in (kv.keys[layer], kv.values[layer]) if t.numel()]
        ours = [t[:, :, :tokens] for t in ours]
        ours += [state for name, state in kv.states.items() if name.split(".")[1] == str(layer)]
        if len(ours) != len(memory):
            return float("inf")
        for mine, wanted in zip(ours, memory, strict=True):
            # a sliding layer keeps the last of them
            same = mine.shape == wanted.shape
            worst = max(worst, apart(mine if same else mine[:, :, -wanted.shape[2] :], wanted))
    return worst


def exit_error(decoder: Decoder, reference: Reference) -> float:
    """How far the engine is from the reference when a token exits after each layer in turn.

    The logits at an exit are those of the cut model, and the layers that ran have written what it
    writes. Later tokens catch up those that exited (KV policy ``defer``), until the cache is whole.
    """
    depth = decoder.num_layers
    exits = CutExits(decoder, [*range(1, depth + 1)])
    options = Options("approximate", "defer", 7, ("exits",))
    engine = Engine(decoder, exits, options=options)  # type: ignore[arg-type]
    sequence = engine.start(TEXT[:PROMPT])
    error = 0.0
    exits.turn = -1
    for layer in range(1, depth + 1):
        tokens = PROMPT + layer
        sequence.replace_last(TEXT[tokens - 1])
        engine.step()
        if sequence.exit_layers[-1] != layer or len(exits.exit_logits) != layer:
            return float("inf")
        logits, kept = reference(TEXT[:tokens], layer)
        error = max(error, apart(exits.exit_logits[-1], logits[-1]))
        error = max(error, memory_error(decoder, kept, tokens))
    sequence.replace_last(TEXT[tokens])
    engine.step()
    engine.catch_up()
    logits, kept = reference(TEXT[: tokens + 1], depth)
    error = max(error, memory_error(decoder, kept, tokens + 1))
    generated = sequence.tokens[-1]
    engine.reset()
    return error if generated == int(logits[-1].argmax()) else float("inf")


class CutExits(ForcedExits):
    """In pass t the new token exits after ``orders[t]`` layers with the LM head's argmax there;
    ``exit_logits`` keeps the logits [V] there."""

    def __init__(self, decoder: Decoder, orders: list[int]) -> None:
        super().__init__(decoder.num_layers, orders, [0] * len(orders))
        self.decoder = decoder
        self.exit_logits: list[Tensor] = []

    def check(
        self,
        layer: int,
        hidden: Tensor,
        state: RowState,
        rows: Any,
        statistics: Any,
        choose: Any,
    ) -> tuple[ExitDecision, RowState]:
        if self.turn < len(self.orders) and self.orders[self.turn] == layer:
            row = rows[0]
            self.exit_logits.append(self.decoder.logits(hidden[:, row : row + 1])[0, 0])
            self.answers[self.turn] = int(self.exit_logits[-1].argmax())
        return super().check(layer, hidden, state, rows, statistics, choose)


def greedy_differs(decoder: Decoder, reference: Reference) -> str:
    """Where greedy decoding with exits off departs from the eager model, or nothing."""
    ids = TEXT[:PROMPT]
    for token in [step.token for step in Engine(decoder).generate(ids, NEW_TOKENS)]:
        wanted = int(reference(ids, decoder.num_layers)[0][-1].argmax())
        if token != wanted:
            return f"greedy token {len(ids) - PROMPT + 1} is {token}, eagerly {wanted}"
        ids = [*ids, token]
    return ""
