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

A head that is not made of a norm, one linear layer, a scale and a soft cap stays as it was: the
report says which node stands in the way. Thresholds are tensors, ``predictor.<layer>.threshold``,
so that all exits share one code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import eepass.ops.fused  # noqa: F401  the operators must be defined before they are traced
from eepass.errors import PassError
from eepass.kernel_forms import HeadChain
from eepass.passes.exits.insert_predictors import PREDICTOR, TRANSLATOR
from eepass.passes.exits.read_head_chain import read_head_chain
from eepass.passes.report import PassReport
from eepass.passes.split.split_segments import structure_of
from eepass.plan import ExitPlan, FusedExits
from eepass.segments import Input, Segment, SplitDecoder


def fuse_exit_predictor(
    split: SplitDecoder,
    plan: ExitPlan,
    tensors: Mapping[str, Tensor],
    report: PassReport,
    rows: int = 1,
) -> FusedExits | None:
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


class _Tracer:
    def __init__(
        self,
        split: SplitDecoder,
        plan: ExitPlan,
        tensors: Mapping[str, Tensor],
        chain: HeadChain,
        rows: int,
    ) -> None:
        self.chain, self.plan = chain, plan
        self.tensors = {**tensors, **plan.threshold_tensors()}
        dtype = tensors[chain.lm_head].dtype
        self.hidden = torch.zeros(1, rows, split.hidden_size, dtype=dtype)
        self.draft = torch.zeros(rows, plan.draft_tokens, dtype=torch.long)
        self.form = (chain.norm, chain.eps, chain.weight_offset)
        self.logit_form = (chain.logit_scale, chain.logit_cap)

    def predictor(self, layer: int, translated: bool) -> Segment:
        translator = [f"translator.{layer}.{part}" if translated else "" for part in TRANSLATOR]
        norm, head = self._norm_and_head()
        mlp = [f"predictor.{layer}.{part}" for part in (*PREDICTOR, "threshold")]

        def run(get: Callable[[str], Any], hidden: Tensor, draft: Tensor, previous: Tensor) -> Any:
            before = [get(name) for name in (*translator, *norm, head[0])]
            probability, probabilities, z, exits = torch.ops.eepass.exit_predictor(
                hidden[0], *before, None, get(head[1]), draft, previous,
                *(get(name) for name in mlp), *self.form, *self.logit_form,
            )  # fmt: skip
            return probability, probabilities, z[None], exits

        kinds = [Input("hidden", "hidden"), Input("draft", "draft"), Input("previous", "previous")]
        examples = [self.hidden, self.draft, torch.zeros(self.draft.shape)]
        return self._trace(run, kinds, examples, [*translator, *norm, *head, *mlp])

    def verify(self, normed: bool) -> Segment:
        norm, head = self._norm_and_head()
        form = ("none", 0.0, 0.0) if normed else self.form
        norm = ["", ""] if normed else norm
        hot = "hot.ids" if self.plan.verify == "hot" else ""
        if hot:
            # rows taken from a head with a bias have theirs
            head = ["hot.head", "hot.bias" if head[1] else ""]

        def run(get: Callable[[str], Any], hidden: Tensor, draft: Tensor) -> Any:
            token, known, _ = torch.ops.eepass.verify_head(
                hidden[0], None, None, None, *(get(name) for name in norm), get(head[0]), None,
                get(head[1]), get(hot), draft, *form, *self.logit_form, False,
            )  # fmt: skip
            return token, known

        kinds = [Input("hidden", "hidden"), Input("draft", "draft")]
        return self._trace(run, kinds, [self.hidden, self.draft], [*norm, *head, hot])

    def topk(self) -> Segment:
        names = ["hot.head", "hot.bias" if self.chain.head_bias else "", "hot.ids"]
        if "hot.head" not in self.tensors:
            names = [self.chain.lm_head, self.chain.head_bias, ""]
        k = self.plan.draft_tokens

        def run(get: Callable[[str], Any], hidden: Tensor) -> Any:
            scores, ids = torch.ops.eepass.draft_topk(
                hidden[0], get(names[0]), None, get(names[1]), get(names[2]), k, *self.logit_form
            )
            return scores, ids

        return self._trace(run, [Input("hidden", "hidden")], [self.hidden], names)

    def _norm_and_head(self) -> tuple[list[str], list[str]]:
        chain = self.chain
        return [chain.norm_weight, chain.norm_bias], [chain.lm_head, chain.head_bias]

    def _trace(
        self,
        run: Callable[..., Any],
        kinds: list[Input],
        examples: Sequence[Tensor],
        names: Sequence[str],
    ) -> Segment:
        # where two roles share a tensor it is one input
        given = list(dict.fromkeys(name for name in names if name))

        def by_name(*values: Tensor) -> Any:
            parameters = dict(zip(given, values[len(examples) :], strict=True))
            return run(parameters.get, *values[: len(examples)])

        mode = FakeTensorMode(allow_non_fake_inputs=True)
        fakes = [mode.from_tensor(x) for x in [*examples, *(self.tensors[n].data for n in given)]]
        with torch.no_grad():
            graph = make_fx(by_name, pre_dispatch=True)(*fakes)
        roles = (*kinds, *(Input("parameter", name) for name in given))
        return Segment(graph, roles, structure_of(graph, roles))
