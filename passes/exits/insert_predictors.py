"""Append a predictor to the layers after which a token may leave.

    before   hidden = layer(hidden, ...)
    after    hidden = layer(hidden, ...)
             state  = eepass.translate(hidden, scale, down, up)      where the exit has a translator
             z      = norm(state)                                     the model's own final norm
             logits = transform(eepass.draft_logits(z, lm_head, draft))
             probability, probabilities = eepass.predict_exit(logits, previous, w1, b1, w2, b2)

Also made here: the verification (z -> logits of the hot or the whole vocabulary)
and the draft from a boundary. Names of the tensors an artefact brings: ``translator.<layer>.*``,
``predictor.<layer>.*``, ``hot.head``, ``hot.bias``. Of a quantised head the operators are
``quantized_draft_logits`` and ``quantized_logits``, over rows of its parts: ``hot.head``,
``hot.head.scales`` and ``hot.head.mins``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from eepass.errors import PassError
from eepass.passes.report import PassReport
from eepass.passes.split.split_segments import structure_of
from eepass.plan import ExitPlan, ExitSegments
from eepass.segments import Input, Segment, SplitDecoder

TRANSLATOR = ("scale", "down", "up")
PREDICTOR = ("w1", "b1", "w2", "b2")
# how the names of a quantised head's parts end
PARTS = ("", ".scales", ".mins")


def insert_predictors(
    split: SplitDecoder,
    plan: ExitPlan,
    tensors: Mapping[str, Tensor],
    report: PassReport,
    rows: int = 1,
) -> ExitSegments:
    """The segments that run at the exit points of ``plan``, for ``rows`` rows; ``split`` is the
    decoder for one row.

    ``tensors`` are the model's and the artefact's. Raises ``PassError`` where the head cannot be
    read row by row, with the reason.
    """
    head = split.head
    if head.norm is None:
        raise PassError(f"early exits need single rows of the LM head: {head.reason}")
    builder = _Builder(split, tensors, plan.draft_tokens, rows)
    predictors = {}
    for point in plan.exits:
        predictors[point.layer] = builder.predictor(point.layer, point.translated)
        report.rewritten += 1
    for layer in range(1, plan.num_layers + 1):
        if plan.at(layer) is None:
            report.skip(f"layer {layer}", "the plan has no exit here")
    drafting = plan.at(plan.draft_layer)
    translated = f"translator.{plan.draft_layer}.down" in tensors or (
        drafting is not None and drafting.translated
    )
    return ExitSegments(
        predictors=predictors,
        verify=builder.logits(hot=plan.verify == "hot"),
        draft=builder.logits(hot=True),
        normed=builder.normed(plan.draft_layer, translated),
    )


class _Builder:
    def __init__(
        self, split: SplitDecoder, tensors: Mapping[str, Tensor], draft_tokens: int, rows: int
    ) -> None:
        self.head, self.tensors = split.head, tensors
        self.draft_tokens, self.rows = draft_tokens, rows
        output = split.layers[0].graph.graph.output_node().all_input_nodes[0].meta["val"]
        self.hidden = torch.zeros(1, rows, output.shape[-1], dtype=output.dtype)

    def predictor(self, layer: int, translated: bool) -> Segment:
        names = [f"translator.{layer}.{part}" for part in TRANSLATOR] if translated else []
        norm_names = self._norm_names()
        head_names = [*self.head.parts.values(), *([self.head.bias] if self.head.bias else [])]
        names += [*norm_names, *head_names]
        names += [f"predictor.{layer}.{part}" for part in PREDICTOR]
        k = self.draft_tokens

        def run(hidden: Tensor, draft: Tensor, previous: Tensor, *parameters: Tensor) -> Any:
            by_name = dict(zip(names, parameters, strict=True))
            z = self._normed(hidden, by_name, layer, translated)
            logits = self._draft_logits(z[0], by_name, draft)
            logits = self._transformed(logits, by_name)
            mlp = [by_name[f"predictor.{layer}.{part}"] for part in PREDICTOR]
            probability, probabilities = torch.ops.eepass.predict_exit(logits, previous, *mlp)
            return probability, probabilities, z

        inputs = [Input("hidden", "hidden"), Input("draft", "draft"), Input("previous", "previous")]
        drafts, previous = torch.zeros(self.rows, k, dtype=torch.long), torch.zeros(self.rows, k)
        examples = [self.hidden, drafts, previous]
        return self._trace(run, inputs, examples, names)

    def normed(self, layer: int, translated: bool) -> Segment:
        names = [f"translator.{layer}.{part}" for part in TRANSLATOR] if translated else []
        names += self._norm_names()

        def run(hidden: Tensor, *parameters: Tensor) -> Tensor:
            by_name = dict(zip(names, parameters, strict=True))
            return self._normed(hidden, by_name, layer, translated)

        return self._trace(run, [Input("hidden", "hidden")], [self.hidden], names)

    def logits(self, hot: bool) -> Segment:
        parts = self.head.parts
        if hot:
            parts = {end: f"hot.head{end}" for end in parts}
        bias = "hot.bias" if hot else self.head.bias
        names = [*parts.values(), *([bias] if bias and bias in self.tensors else [])]

        def run(z: Tensor, *parameters: Tensor) -> Tensor:
            by_name = dict(zip(names, parameters, strict=True))
            given = [by_name.get(parts.get(end, "")) for end in PARTS]
            if self.head.scales:
                logits = torch.ops.eepass.quantized_logits(
                    z[0], *given, by_name.get(bias), self.head.dynamic
                )
            else:
                logits = torch.ops.eepass.logits_rows(z[0], given[0], by_name.get(bias))
            return self._transformed(logits, by_name)[None]

        return self._trace(run, [Input("hidden", "hidden")], [self.hidden], names)

    def _normed(
        self, hidden: Tensor, by_name: Mapping[str, Tensor], layer: int, translated: bool
    ) -> Tensor:
        if translated:
            parts = [by_name[f"translator.{layer}.{part}"] for part in TRANSLATOR]
            hidden = torch.ops.eepass.translate(hidden[0], *parts)[None]
        return self.head.normed(hidden, by_name)

    def _draft_logits(self, z: Tensor, by_name: Mapping[str, Tensor], draft: Tensor) -> Tensor:
        head, bias = self.head, by_name.get(self.head.bias)
        if not head.scales:
            return torch.ops.eepass.draft_logits(z, by_name[head.weight], bias, draft)
        given = [by_name.get(head.parts.get(end, "")) for end in PARTS]
        return torch.ops.eepass.quantized_draft_logits(z, *given, bias, draft)

    def _transformed(self, logits: Tensor, by_name: Mapping[str, Tensor]) -> Tensor:
        if self.head.transform is None:
            return logits
        return self.head.transform.graph(logits).float()

    def _norm_names(self) -> list[str]:
        assert self.head.norm is not None
        return [role.name for role in self.head.norm.inputs if role.kind == "parameter"]

    def _trace(
        self,
        run: Callable[..., Any],
        inputs: list[Input],
        examples: list[Tensor],
        names: list[str],
    ) -> Segment:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        fakes = [mode.from_tensor(x) for x in [*examples, *(self.tensors[n].data for n in names)]]
        with torch.no_grad():
            graph = make_fx(run, pre_dispatch=True)(*fakes)
        roles = (*inputs, *(Input("parameter", name) for name in names))
        return Segment(graph, roles, structure_of(graph, roles))
