"""Append a predictor to the layers after which a token may exit.

    before   hidden = layer(hidden, ...)
    after    hidden = layer(hidden, ...)
             state  = eepass.translate(hidden, scale, down, up)      where the exit has a translator
             z      = norm(state)                                     the model's own final norm
             logits = transform(eepass.draft_logits(z, lm_head, draft))
             probability, probabilities = eepass.predict_exit(logits, previous, w1, b1, w2, b2)

Also made here: the verification (z -> logits of the hot or the whole vocabulary) and the draft from
a hidden state. Of a quantised head the operators are ``packed_draft_logits`` and
``packed_logits``.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from eepass.errors import PassError
from eepass.passes.exits.trace_segment import DRAFT, PREVIOUS, Get, SegmentTracer
from eepass.passes.report import PassReport
from eepass.plan import ExitPlan, ExitSegments
from eepass.segments import HIDDEN, Segment, SplitDecoder


def insert_predictors(
    split: SplitDecoder, plan: ExitPlan, tensors: Mapping[str, Tensor], report: PassReport,
    rows: int = 1,
) -> ExitSegments:  # fmt: skip
    """The segments that run at the exit points of ``plan``, for ``rows`` rows; ``split`` is the
    decoder for one row.

    ``tensors`` are the model's and the artefact's. Raises ``PassError`` where the head cannot be
    read row by row, with the reason.
    """
    if split.head.norm is None:
        raise PassError(f"early exits need single rows of the LM head: {split.head.reason}")
    trace = _Tracer(split, tensors, plan.draft_tokens, rows)
    report.rewritten += len(plan.exits)
    for layer in range(1, plan.num_layers + 1):
        if plan.at(layer) is None:
            report.skip(f"layer {layer}", "the plan has no exit here")
    return ExitSegments(
        predictors={p.layer: trace.predictor(p.layer, p.translated) for p in plan.exits},
        verify=trace.logits(hot=plan.verify == "hot"),
        draft=trace.logits(hot=True),
        normed=trace.normed(plan.draft_layer),
    )


class _Tracer(SegmentTracer):
    def __init__(
        self, split: SplitDecoder, tensors: Mapping[str, Tensor], draft_tokens: int, rows: int
    ) -> None:
        super().__init__(split, tensors, draft_tokens, rows)
        assert split.head.norm is not None
        self.head, self.norm_names = split.head, split.head.norm.parameters

    def predictor(self, layer: int, translated: bool) -> Segment:
        translator = self.translator_names(layer) if translated else []
        head = self.head
        mlp = self.predictor_names(layer)

        def run(get: Get, hidden: Tensor, draft: Tensor, previous: Tensor) -> Any:
            z = self._normed(translator, get, hidden)
            weight, bias = get(head.weight), get(head.bias)
            if head.quantized:
                logits = torch.ops.eepass.packed_draft_logits(
                    z[0], weight, head.form, head.outputs, bias, draft
                )
            else:
                logits = torch.ops.eepass.draft_logits(z[0], weight, bias, draft)
            logits = self._transformed(logits)
            return *torch.ops.eepass.predict_exit(logits, previous, *map(get, mlp)), z

        names = [*translator, *self.norm_names, head.weight, head.bias, *mlp]
        return self.trace(run, (HIDDEN, DRAFT, PREVIOUS), names)

    def normed(self, layer: int) -> Segment:
        translated = f"translator.{layer}.down" in self.tensors
        translator = self.translator_names(layer) if translated else []
        run = partial(self._normed, translator)
        return self.trace(run, (HIDDEN,), [*translator, *self.norm_names])

    def logits(self, hot: bool) -> Segment:
        head = self.head
        name, bias = ("hot.head", "hot.bias") if hot else (head.weight, head.bias)
        bias = bias if bias in self.tensors else ""
        outputs = self.tensors["hot.ids"].numel() if hot and head.quantized else head.outputs

        def run(get: Get, z: Tensor) -> Tensor:
            if head.quantized:
                logits = torch.ops.eepass.packed_logits(
                    z[0], get(name), head.form, outputs, get(bias), head.activations
                )
            else:
                logits = torch.ops.eepass.logits_rows(z[0], get(name), get(bias))
            return self._transformed(logits)[None]

        return self.trace(run, (HIDDEN,), [name, bias])

    def _normed(self, translator: list[str], get: Get, hidden: Tensor) -> Tensor:
        if translator:
            hidden = torch.ops.eepass.translate(hidden[0], *map(get, translator))[None]
        return self.head.normed(hidden, {name: get(name) for name in self.norm_names})

    def _transformed(self, logits: Tensor) -> Tensor:
        transform = self.head.transform
        return logits if transform is None else transform.graph(logits).float()
