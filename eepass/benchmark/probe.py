"""``eepass.probe``: will early exit pay for this model?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from eepass.checkpoints.models import LoadedModel
from eepass.errors import InputError
from eepass.lengths import usual_length
from eepass.model import EarlyExitModel, transform
from eepass.ops import exits as exit_ops
from eepass.runtime.engine.engine import Engine
from eepass.training.dense_model import HOT_TOKENS
from eepass.training.lens import Lens
from eepass.training.translators import fit_translator

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
    """Where each layer already says what the last one will, and what that allows.

    ``agreement_by_layer[i]``: share of tokens whose logit lens after i + 1 layers gives the dense
    answer. ``first_agreement_mean``, ``stable_mean``: layers until it first does, and until it
    stays so. ``lm_head_layers``, ``draft_layers``: what the LM head and a draft over the hot
    vocabulary weigh, in layers. ``bound``, ``bound_hot``: the speed-up of an oracle that leaves at
    the first agreement, verifying on the whole or on the hot vocabulary. With ``translate`` the
    same after a quick fit of translators on half of the answers.
    """
    encoded = [loaded.encode(prompt, raw) for prompt in prompts]
    if loaded.transformed:
        max_length = min(max_length, loaded.model.decoder.longest)
    else:
        max_length = usual_length(loaded.model, max_length)
    longest = max_length - new_tokens
    fitting = [ids for ids in encoded if len(ids) <= longest]
    if not fitting:
        raise InputError(f"every prompt is longer than {longest} tokens: raise max_length")
    model = transform(loaded.model, None, max_length=max_length, stop=loaded.stop)
    lens = Lens(model.decoder)
    parts: list[list[Tensor]] = []
    for ids in fitting:
        answer = [step.token for step in model.dense.generate(ids, new_tokens, loaded.stop)]
        if len(answer) > 1:
            parts.append(_boundaries(model.dense, ids, answer))
    if not parts:
        raise InputError("the model answers every prompt with one token: nothing to measure")
    boundaries = [torch.cat(layer) for layer in zip(*parts, strict=True)]
    dense = lens.tokens(boundaries[-1])
    agrees = torch.stack([lens.tokens(hidden) == dense for hidden in boundaries[1:]])  # [L, n]
    report = _report(model, agrees)
    report["prompts"], report["tokens"] = len(parts), int(agrees.shape[1])
    if translate:
        report["translated"] = _translated(model, lens, boundaries, dense)
    report["verdict"] = _verdict(report)
    return report


def _boundaries(engine: Engine, ids: list[int], answer: list[int]) -> list[Tensor]:
    """Boundaries 0..L at the positions that predict the answer, [n, H] each."""
    kept: list[list[Tensor]] = [[] for _ in range(engine.decoder.num_layers + 1)]
    engine.prefill(
        [*ids, *answer[:-1]], lambda layer, hidden: kept[layer].append(hidden[0].clone())
    )
    return [torch.cat(parts)[len(ids) - 1 :] for parts in kept]


def _report(model: EarlyExitModel, agrees: Tensor) -> dict[str, Any]:
    depth = agrees.shape[0]
    first = agrees.float().argmax(0) + 1.0
    wrong_below = (~agrees).flip(0).float()
    # layers after the last one that disagrees
    stable = torch.where(wrong_below.any(0), depth - wrong_below.argmax(0) + 1.0, 1.0)
    layer = model.splits[1].layers[depth - 1]
    tensors = model.decoder.tensors
    layer_size = sum(tensors[r.name].nbytes for r in layer.inputs if r.kind == "parameter")
    parts = [tensors[name] for name in model.splits[1].head.parts.values()]
    head = sum(part.nbytes for part in parts) / layer_size
    hot = head * min(HOT_TOKENS, len(parts[0])) / len(parts[0])
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


def _translated(
    model: EarlyExitModel, lens: Lens, boundaries: list[Tensor], dense: Tensor
) -> dict[str, Any]:
    """Agreement at every other layer of the deeper half; fitted on one half of the tokens."""
    depth = len(boundaries) - 1
    half = len(dense) // 2
    z = lens.norm(boundaries[-1])
    hot = torch.bincount(dense, minlength=len(lens.lm_head)).argsort(descending=True)[:HOT_TOKENS]
    hot_head = lens.lm_head[hot].contiguous()
    layers = list(range(depth // 2, depth, 2))
    agreement = {}
    for layer in layers:
        fitted = fit_translator(
            boundaries[layer][:half], z[:half], lens.norm, hot_head, lambda done: None, passes=12
        )
        moved = exit_ops.translate(boundaries[layer][half:], *fitted.values())
        agreement[str(layer)] = float((lens.tokens(moved) == dense[half:]).float().mean())
    lens_there = {
        str(layer): float((lens.tokens(boundaries[layer][half:]) == dense[half:]).float().mean())
        for layer in layers
    }
    return {"agreement_by_layer": agreement, "lens_on_the_same": lens_there, "fitted_on": half}


def _verdict(report: dict[str, Any]) -> str:
    best = max(report["bound"], report["bound_hot"])
    layers, first = report["layers"], report["first_agreement_mean"]
    known = f"answers are first right after {first:.1f} of {layers} layers"
    if best < WORTH_IT:
        return f"will not pay: {known}, an oracle would gain {best:.2f}x at most"
    if report["bound"] < WORTH_IT:
        return (
            f"may pay, with verification on the hot vocabulary only: {known}, the LM head weighs "
            f"{report['lm_head_layers']:.1f} layers (oracle {report['bound']:.2f}x with the whole "
            f"head, {report['bound_hot']:.2f}x with the hot one)"
        )
    return f"may pay: {known}, an oracle would gain {best:.2f}x"
