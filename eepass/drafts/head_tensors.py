"""A draft head's tensors under the names of EAGLE-3 checkpoints, and back; nothing is rounded.

    here                          there
    fc [E, z | after a | after b] fc.weight [E, after a | after b | after the last layer]
    fc_norm [z | a | b]           fc_norm.{0,1,2}.weight; of z: times the final norm's weight
    q, k, v, o                    midlayer.self_attn.{q,k,v,o}_proj.weight
    gate, up, down                midlayer.mlp.{gate,up,down}_proj.weight
    token_norm, hidden_norm       midlayer.{input_layernorm,hidden_norm}.weight
    mlp_norm, norm                midlayer.post_attention_layernorm.weight, norm.weight
    hot.ids [N]                   d2t [N] (token id - place), t2d bool [V]
    hot.head [N, E]               lm_head.weight
    embedding [V, E]              embed_tokens.weight, where it is not the model's

z is the model's last hidden state, normed with its final norm: the hidden state after the last
layer under an ``fc_norm`` that holds both norms' weights. That product of two bfloat16 is exact in
float32, so the head's own weight can be found again.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from eepass.errors import InputError
from eepass.runtime.drafting.eagle_form import form_of

MIDLAYER, LAYER = "midlayer.", "layers.0."
NAMES = {
    "q": "midlayer.self_attn.q_proj.weight",
    "k": "midlayer.self_attn.k_proj.weight",
    "v": "midlayer.self_attn.v_proj.weight",
    "o": "midlayer.self_attn.o_proj.weight",
    "gate": "midlayer.mlp.gate_proj.weight",
    "up": "midlayer.mlp.up_proj.weight",
    "down": "midlayer.mlp.down_proj.weight",
    "token_norm": "midlayer.input_layernorm.weight",
    "hidden_norm": "midlayer.hidden_norm.weight",
    "mlp_norm": "midlayer.post_attention_layernorm.weight",
    "norm": "norm.weight",
    "input_norm": "input_norm.weight",
    "hot.head": "lm_head.weight",
    "embedding": "embed_tokens.weight",
    "fc": "fc.weight",
}


def to_checkpoint(
    head: Mapping[str, Tensor], final_norm: Tensor | None, depth: int, vocabulary: int
) -> tuple[dict[str, Tensor], tuple[int, ...]]:
    """The checkpoint's tensors of ``head``, in the flat form, and after which layers its features
    are taken; ``final_norm`` [H]: of the model of ``depth`` layers, for a head that reads z.

    ``head`` holds ``hot.ids`` and ``hot.head``.
    """
    form = form_of(head)
    layers = [int(layer) for layer in head["features"]]
    # z comes first here, and is of the last layer there
    order = [depth, *layers] if form.reads_z else layers
    if len(set(order)) < len(order):
        raise InputError(f"the draft head reads z and the hidden state after layer {depth} too")
    places = sorted(range(len(order)), key=order.__getitem__)
    made = {there: head[here] for here, there in NAMES.items() if here in head and here != "fc"}
    columns = head["fc"].chunk(form.features, 1)
    made["fc.weight"] = torch.cat([columns[place] for place in places], 1)
    if form.fc_norm == "each":
        norms = [*head["fc_norm"].chunk(form.features)]
        if form.reads_z:
            assert final_norm is not None
            norms[0] = norms[0].float() * final_norm.float()
        made |= {f"fc_norm.{n}.weight": norms[place] for n, place in enumerate(places)}
    elif form.reads_z:
        raise InputError("the draft head reads z, and its features are not normed each by itself")
    hot = head["hot.ids"].long()
    if not torch.equal(hot, torch.arange(vocabulary)):
        known = torch.zeros(vocabulary, dtype=torch.bool)
        known[hot] = True
        made |= {"d2t": hot - torch.arange(len(hot)), "t2d": known}
    return made, tuple(order[place] for place in places)


def in_speculators_form(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``tensors`` of the flat form under the names of the library ``speculators``."""
    return {name.replace(MIDLAYER, LAYER): tensor for name, tensor in tensors.items()}


def with_z(head: Mapping[str, Tensor], final_norm: Tensor, depth: int) -> dict[str, Tensor] | None:
    """``head``, which reads the hidden state after the last of ``depth`` layers under a norm of its
    own, reading z instead, where that is the same head to the last bit; else None."""
    form = form_of(head)
    layers = head["features"].tolist()
    if form.fc_norm != "each" or layers[-1:] != [depth] or "embedding" in head:
        return None
    *columns, last = head["fc"].chunk(form.features, 1)
    *norms, product = head["fc_norm"].chunk(form.features)
    own = (product.float() / final_norm.float()).to(head["norm"].dtype)
    others = [norm.to(own.dtype) for norm in norms]
    same = [torch.equal(a.float(), b.float()) for a, b in zip(others, norms, strict=True)]
    if not torch.equal(own.float() * final_norm.float(), product.float()) or not all(same):
        return None
    made = {**head, "fc": torch.cat([last, *columns], 1), "features": head["features"][:-1]}
    made["fc_norm"] = torch.cat([own, *others])
    del made["reads_z"]
    return made
