"""The model that is trained for, compiled: run densely, read by the logit lens, and timed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from eepass.codegen.lower_cpu import CpuCompiler
from eepass.errors import InputError, PassError
from eepass.lengths import usual_length
from eepass.passes.pipeline import split_for_rows
from eepass.runtime.decoder.decoder import Decoder
from eepass.runtime.engine.engine import Engine
from eepass.training.calibration import Costs

# rows of a pass, and sequences decoded at once: more rows cost each as much
BATCH = 32
HOT_TOKENS = 8192
# measured in layers of smollm2 in bf16 on two cores: the call of a small compiled segment, ranking
# the draft tokens, and one more row in a layer
CALL = 0.2
TOPK = 0.2
ROW = 0.1


class Lens:
    """The logit lens: what the final norm and the LM head make of the hidden state after a layer.

    ``lm_head`` [V, H] holds plain values.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.head = decoder.splits[1].head
        if self.head.norm is None:
            raise InputError(f"early exit is not possible here: {self.head.reason}")
        self.tensors = decoder.tensors
        self.lm_head = self.head.values(self.tensors, decoder.dtype)

    def norm(self, hidden: Tensor) -> Tensor:
        """The normed states z [n, H] of hidden states [n, H], differentiable."""
        return self.head.normed(hidden[None], self.tensors)[0]

    def transform(self, logits: Tensor) -> Tensor:
        """What the model does to its logits (a scale, a soft cap)."""
        return logits if self.head.transform is None else self.head.transform.graph(logits)

    def tokens(self, hidden: Tensor) -> Tensor:
        """The likeliest token [n] for each hidden state [n, H]."""
        return torch.cat([best_token(self.norm(h), self.lm_head) for h in hidden.split(512)])


def best_token(z: Tensor, lm_head: Tensor, candidates: int = 8) -> Tensor:
    """The row of ``lm_head`` with the largest logit for each z [n, H]: of the best ``candidates``
    by logits in the model's dtype, the best by logits in float32."""
    best = (z @ lm_head.T).topk(candidates, -1).indices  # [n, candidates]
    exact = torch.einsum("nh,nkh->nk", z.float(), lm_head[best].float())
    return best.gather(1, exact.argmax(-1, keepdim=True))[:, 0]


class DenseModel:
    """``engine`` decodes densely, ``batch`` sequences of ``max_length`` at a time; ``lens`` reads
    hidden states, ``embedding`` is [V, H].

    Raises ``InputError`` for a model that cannot be split, or whose LM head cannot be trained for.
    """

    @torch.no_grad()
    def __init__(self, model: Any, max_length: int) -> None:
        self.original, self.max_length = model, usual_length(model, max_length)
        slots = -(-(BATCH * self.max_length + BATCH) // 64) * 64
        try:
            # prompts go in chunks of as many rows: with more, attention reads the whole cache
            splits, _ = split_for_rows(model, slots, (1, BATCH), BATCH)
        except PassError as error:
            raise InputError(f"{type(model).__name__} cannot be trained: {error}") from error
        self.engine = Engine(Decoder(splits, CpuCompiler()))
        self.decoder = self.engine.decoder
        # recurrent states belong to one sequence
        self.batch = 1 if splits[1].stepwise else BATCH
        self.lens = Lens(self.decoder)
        self.lm_head = self.lens.lm_head
        if self.lens.head.bias:
            raise InputError("training for an LM head with a bias is not supported yet")
        self.embedding: Tensor = model.get_input_embeddings().weight.detach()
        weights = [self.decoder.tensors[name] for name in splits[1].layers[-1].parameters]
        self.layer_size = sum(weight.nbytes for weight in weights)
        # a byte of uint8 holds two codes
        codes = sum(weight.numel() for weight in weights if weight.dtype == torch.uint8)
        plain = (sum(weight.numel() for weight in weights) + codes) * self.decoder.dtype.itemsize
        # the time of a layer of plain weights, in layers of this model: quantised layers take less
        # time, calls of small segments do not
        self.plain_layer = plain / self.layer_size

    def best_tokens(self, hidden: Tensor) -> Tensor:
        """The dense tokens [n] after hidden states of the last layer [n, H]."""
        parts = hidden[None].split(BATCH, 1)
        return torch.cat([self.decoder.logits(part)[0].argmax(-1) for part in parts])

    def costs(self, hot_tokens: int) -> Costs:
        """Costs in layers: the LM head as timed, what reads rows of it in proportion to them."""
        decoder = self.decoder
        hidden = torch.zeros(1, 1, decoder.hidden_size, dtype=decoder.dtype)
        place = decoder.side_inputs.span(0, 1)
        layers, heads = [], []
        for _ in range(12):
            began = time.perf_counter()
            for layer in range(decoder.num_layers):
                decoder.run_layer(layer, hidden, place)
            middle = time.perf_counter()
            decoder.logits(hidden)
            layers.append(middle - began)
            heads.append(time.perf_counter() - middle)
        head = statistics.median(heads) / statistics.median(layers) * decoder.num_layers
        hot = head * min(hot_tokens, len(self.lm_head)) / len(self.lm_head)
        return Costs(
            num_layers=decoder.num_layers,
            head=head,
            draft=hot + (CALL + TOPK) * self.plain_layer,
            predictor=CALL * self.plain_layer,
            verify=hot + CALL / 2 * self.plain_layer,
            row=ROW * self.plain_layer,
        )

    def costs_with_draft_head(self, costs: Costs, draft_head: Mapping[str, Tensor]) -> Costs:
        """``costs`` where the draft head drafts and the whole LM head verifies."""
        size = sum(part.numel() for part in draft_head.values()) * self.decoder.dtype.itemsize
        hot = costs.head * len(draft_head["hot.ids"]) / len(self.lm_head)
        draft = hot + (CALL + TOPK) * self.plain_layer + size / self.layer_size
        return replace(costs, draft=draft, verify=costs.head)
