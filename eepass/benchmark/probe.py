"""``eepass.probe``: will early exit pay for this model?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from eepass.benchmark.frontier import hidden_states
from eepass.checkpoints.models import LoadedModel
from eepass.errors import InputError
from eepass.lengths import usual_length
from eepass.model import EarlyExitModel, transform
from eepass.ops import exits as exit_ops
from eepass.training.dense_model import HOT_TOKENS, Lens
from eepass.training.exits import fit_translator

# below this a compiled model gains nothing that a user would notice
WORTH_IT = 1.10


def probe(
    loaded: LoadedModel,
    prompts: Sequence[str],
    new_tokens: int = 64,
    translate: bool = False,
    raw: bool = False,
    max_length: int = 768,
) -> dict[str, Any]:
    """From which layer on the dense argmax is known, and the speed-up that allows.

    ``agreement_by_layer[i]``: share of tokens whose logit lens after i + 1 layers gives the dense
    argmax. ``first_agreement_mean``, ``stable_mean``: layers until it first does, and until it does
    at every later layer as well. ``lm_head_layers``, ``draft_layers``: what the LM head and a draft
    over the hot vocabulary cost, in layers. ``bound``, ``bound_hot``: the speed-up of an oracle
    that exits at the first agreement, verifying on the whole or on the hot vocabulary. With
    ``translate`` the same after a quick fit of translators on half of the answers.
    """
    if loaded.transformed:
        max_length = min(max_length, loaded.model.decoder.max_sequence_length)
    else:
        max_length = usual_length(loaded.model, max_length)
    longest = max_length - new_tokens
    encoded = [loaded.encode(prompt, raw) for prompt in prompts]
    encoded = [ids for ids in encoded if len(ids) <= longest]
    if not encoded:
        raise InputError(f"every prompt is longer than {longest} tokens: raise max_length")
    model = transform(loaded.model, None, max_length=max_length, stop=loaded.stop)
    lens = Lens(model.decoder)
    parts: list[list[Tensor]] = []
    for ids in encoded:
        answer = [step.token for step in model.host_engine().generate(ids, new_tokens, loaded.stop)]
        if len(answer) > 1:
            parts.append(hidden_states(model.host_engine(), ids, answer))
    if not parts:
        raise InputError("the model answers every prompt with one token: nothing to measure")
    states = [torch.cat(layer) for layer in zip(*parts, strict=True)]
    dense = lens.tokens(states[-1])
    agrees = torch.stack([lens.tokens(hidden) == dense for hidden in states[1:]])  # [L, n]
    report = _report(model, agrees)
    report["prompts"], report["tokens"] = len(parts), int(agrees.shape[1])
    if translate:
        report["translated"] = _translated(lens, states, dense, agrees)
    report["verdict"] = _verdict(report)
    return report


def _report(model: EarlyExitModel, agrees: Tensor) -> dict[str, Any]:
    depth = agrees.shape[0]
    first = agrees.float().argmax(0) + 1.0
    # from the last layer down; stable are the layers after the last one that disagrees
    disagrees = (~agrees).flip(0).float()
    stable = torch.where(disagrees.any(0), depth - disagrees.argmax(0) + 1.0, 1.0)
    layer = model.splits[1].layers[depth - 1]
    tensors = model.decoder.tensors
    layer_size = sum(tensors[name].nbytes for name in layer.parameters)
    lm_head = model.splits[1].head
    weight = tensors[lm_head.weight]
    head, vocabulary = weight.nbytes / layer_size, lm_head.outputs or len(weight)
    hot = head * min(HOT_TOKENS, vocabulary) / vocabulary
    mean = float(first.mean())
    return {
        "layers": depth,
        "agreement_by_layer": [round(float(row.float().mean()), 4) for row in agrees],
        "first_agreement_mean": mean,
        "stable_mean": float(stable.mean()),
        "lm_head_layers": head,
        "draft_layers": hot,
        "bound": (depth + head) / (mean + head + hot),
        "bound_hot": (depth + head) / (mean + 2 * hot),
    }


def _translated(lens: Lens, states: list[Tensor], dense: Tensor, agrees: Tensor) -> dict[str, Any]:
    """Agreement at every other layer of the deeper half; fitted on one half of the tokens."""
    depth = len(states) - 1
    half = len(dense) // 2
    normed = lens.norm(states[-1])
    hot = torch.bincount(dense, minlength=len(lens.lm_head)).argsort(descending=True)[:HOT_TOKENS]
    hot_head = lens.lm_head[hot].contiguous()
    agreement, untranslated = {}, {}
    for layer in range(depth // 2, depth, 2):
        fit, held_out = states[layer][:half], states[layer][half:]
        fitted = fit_translator(
            fit, normed[:half], lens.norm, hot_head, lambda done: None, passes=12
        )
        right = lens.tokens(exit_ops.translate(held_out, *fitted.values())) == dense[half:]
        agreement[str(layer)] = float(right.float().mean())
        untranslated[str(layer)] = float(agrees[layer - 1, half:].float().mean())
    return {"agreement_by_layer": agreement, "lens_on_the_same": untranslated, "fitted_on": half}


def _verdict(report: dict[str, Any]) -> str:
    best = max(report["bound"], report["bound_hot"])
    layers, first = report["layers"], report["first_agreement_mean"]
    known = f"answers are first known after {first:.1f} of {layers} layers"
    if best < WORTH_IT:
        return f"will not pay: {known}, an oracle would gain {best:.2f}x at most"
    if report["bound"] < WORTH_IT:
        return (
            f"may pay, with verification on the hot vocabulary only: {known}, the LM head costs "
            f"{report['lm_head_layers']:.1f} layers (oracle {report['bound']:.2f}x with the whole "
            f"head, {report['bound_hot']:.2f}x with the hot one)"
        )
    return f"may pay: {known}, an oracle would gain {best:.2f}x"
