"""Write each exit point as one operator, where the head is one that kernels know.

    before   state = eepass.translate(hidden, ...)
             z = norm(state)
             logits = transform(eepass.draft_logits(z, lm_head, bias, draft))
             probability, probabilities = eepass.predict_exit(logits, previous, ...)
    after    probability, probabilities, z, exits = eepass.exit_predictor(hidden, ..., chain)

    before   logits = transform(eepass.logits_rows(z, lm_head, bias)), argmax, in draft
    after    token, known, _ = eepass.verify_head(z, lm_head, bias, hot_ids, draft, chain)

    before   logits = transform(eepass.logits_rows(z, hot_head, bias)), the k largest
    after    scores, ids = eepass.draft_topk(z, hot_head, bias, hot_ids, k, chain)

A head that is not made of a norm, one linear layer, a scale and a soft cap is left alone; the
report says which node stands in the way. Thresholds are tensors, so that all exits share one code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import eepass.ops.fused  # noqa: F401  the operators must be defined before they are traced
from eepass.errors import PassError
from eepass.kernel_forms import HeadChain
from eepass.passes.exits.read_head_chain import read_head_chain
from eepass.passes.exits.trace_segment import DRAFT, PREVIOUS, Get, SegmentTracer
from eepass.passes.report import PassReport
from eepass.plan import ExitPlan, FusedExits
from eepass.segments import HIDDEN, Segment, SplitDecoder


def fuse_exit_predictor(
    split: SplitDecoder, plan: ExitPlan, tensors: Mapping[str, Tensor], report: PassReport,
    rows: int = 1,
) -> FusedExits | None:  # fmt: skip
    """The exit points of ``plan`` for ``rows`` rows, or None with the reason in ``report``.

    ``split`` is the decoder for one row; ``tensors`` the model's and the artefact's.
    """
    try:
        chain = read_head_chain(split.head)
    except PassError as error:
        report.skip("head", str(error))
        return None
    if plan.verify == "hot" and chain.head_bias and "hot.bias" not in tensors:
        report.skip("head", f"{chain.head_bias}: the hot vocabulary has no bias (hot.bias)")
        return None
    trace = _Tracer(split, plan, tensors, chain, rows)
    predictors = {p.layer: trace.predictor(p.layer, p.translated) for p in plan.exits}
    report.rewritten += len(predictors) + 3
    report.note(f"head: {chain}")
    verify, final = trace.verify(normed=True), trace.verify(normed=False)
    return FusedExits(chain, predictors, verify, final, trace.topk())


class _Tracer(SegmentTracer):
    def __init__(
        self, split: SplitDecoder, plan: ExitPlan, tensors: Mapping[str, Tensor], chain: HeadChain,
        rows: int,
    ) -> None:  # fmt: skip
        tensors = {**tensors, **plan.threshold_tensors()}
        super().__init__(split, tensors, plan.draft_tokens, rows)
        self.chain, self.plan = chain, plan
        self.norm = [chain.norm_weight, chain.norm_bias]
        self.form = (chain.norm, chain.eps, chain.weight_offset)
        self.logit_form = (chain.logit_scale, chain.logit_cap)

    def predictor(self, layer: int, translated: bool) -> Segment:
        chain = self.chain
        before = [*(self.translator_names(layer) if translated else ["", "", ""]), *self.norm]
        mlp = [*self.predictor_names(layer), f"predictor.{layer}.threshold"]

        def run(get: Get, hidden: Tensor, draft: Tensor, previous: Tensor) -> Any:
            probability, probabilities, z, exits = torch.ops.eepass.exit_predictor(
                hidden[0], *map(get, before), get(chain.lm_head), None, get(chain.head_bias),
                draft, previous, *map(get, mlp), *self.form, *self.logit_form,
            )  # fmt: skip
            return probability, probabilities, z[None], exits

        names = [*before, chain.lm_head, chain.head_bias, *mlp]
        return self.trace(run, (HIDDEN, DRAFT, PREVIOUS), names)

    def verify(self, normed: bool) -> Segment:
        norm, form = (["", ""], ("none", 0.0, 0.0)) if normed else (self.norm, self.form)
        head, bias, ids = self._vocabulary(self.plan.verify == "hot")

        def run(get: Get, hidden: Tensor, draft: Tensor) -> Any:
            token, known, _ = torch.ops.eepass.verify_head(
                hidden[0], None, None, None, *map(get, norm), get(head), None, get(bias), get(ids),
                draft, *form, *self.logit_form, False,
            )  # fmt: skip
            return token, known

        return self.trace(run, (HIDDEN, DRAFT), [*norm, head, bias, ids])

    def topk(self) -> Segment:
        head, bias, ids = self._vocabulary("hot.head" in self.tensors)

        def run(get: Get, hidden: Tensor) -> Any:
            return torch.ops.eepass.draft_topk(
                hidden[0], get(head), None, get(bias), get(ids), self.plan.draft_tokens,
                *self.logit_form,
            )  # fmt: skip

        return self.trace(run, (HIDDEN,), [head, bias, ids])

    def _vocabulary(self, hot: bool) -> tuple[str, str, str]:
        """Names of the weight, the bias and the token ids of the hot or the whole vocabulary."""
        if not hot:
            return self.chain.lm_head, self.chain.head_bias, ""
        # rows of a head with a bias have theirs
        return "hot.head", "hot.bias" if self.chain.head_bias else "", "hot.ids"
