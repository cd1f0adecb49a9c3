"""What ``transform`` is given as ``draft_model``, made a source of draft tokens."""

from __future__ import annotations

from copy import copy
from typing import Any

from torch import nn

from eepass import private_names
from eepass.early_exit_model import EarlyExitModel
from eepass.errors import InputError
from eepass.executors import token_embedding
from eepass.runtime.decoder.decoder import Decoder
from eepass.runtime.drafting.borrowed import DFlashDraft, MtpDraft
from eepass.runtime.drafting.cascade import Head
from eepass.runtime.drafting.model_draft import ModelDraft


def refuse_other_drafts(given: Any) -> None:
    """``InputError`` for a ``draft_model`` of no known kind."""
    known = given is None or isinstance(given, EarlyExitModel) or _is_mtp(given)
    if not known and not _is_dflash(given):
        raise InputError(
            f"draft_model={type(given).__name__}: give a transformed model (eepass.transform), or "
            "of transformers an MtpModel or a DFlash assistant"
        )


def draft_from(given: Any, decoder: Decoder, model: Any) -> Head | None:
    """The draft source that ``given`` is for ``decoder``; ``model``: the original it was made of,
    None where that is not at hand.

    Raises ``InputError`` where the two do not fit together.
    """
    if given is None or isinstance(given, EarlyExitModel):
        return None if given is None else ModelDraft(given.decoder)
    name, width = type(given).__name__, given.config.hidden_size
    if width != decoder.hidden_size:
        raise InputError(
            f"draft_model={name}: its hidden states have {width} numbers, those of the model "
            f"{decoder.hidden_size}; give the one that was trained for this model"
        )
    if _is_mtp(given):
        known, own = given.embed_tokens.num_embeddings, len(token_embedding(decoder))
        if known != own:
            raise InputError(
                f"draft_model={name}: its vocabulary has {known} tokens, that of the model {own}; "
                "give the one that was made of this model"
            )
        return MtpDraft(given, decoder.normed)
    return _dflash(given, decoder, model)


def _dflash(given: Any, decoder: Decoder, model: Any) -> DFlashDraft:
    name, config = type(given).__name__, given.config
    if model is None:
        raise InputError(
            f"draft_model={name}: it drafts with the embedding and the LM head of the original "
            "model: transform that, not a transformed one"
        )
    embedding = model.get_input_embeddings()
    if config.mask_token_id >= embedding.num_embeddings:
        raise InputError(
            f"draft_model={name}: its mask token is {config.mask_token_id}, and the vocabulary of "
            f"the model has {embedding.num_embeddings} tokens; give the one trained for this model"
        )
    last = max(config.target_layer_ids) + 1
    if last > decoder.num_layers:
        raise InputError(
            f"draft_model={name}: it reads the hidden state after layer {last}, and the model has "
            f"{decoder.num_layers}; give the one that was trained for this model"
        )
    head = model.get_output_embeddings()
    return DFlashDraft(given, decoder.normed, decoder.num_layers, _unnormed(embedding), head)


def _unnormed(embedding: nn.Module) -> nn.Module:
    """``embedding`` over the same weights without the norm that some add to it: DFlash models are
    trained without."""
    if not hasattr(embedding, "embed_norm"):
        return embedding
    plain = copy(embedding)
    plain._modules = {**embedding._modules, "embed_norm": nn.Identity()}
    return plain


def _is_mtp(given: Any) -> bool:
    return isinstance(given, nn.Module) and isinstance(given, private_names.MtpModel)


def _is_dflash(given: Any) -> bool:
    # no class is shared by all of them
    return getattr(given, "main_input_name", None) == "noise_embeds" and all(
        hasattr(given.config, name) for name in ("block_size", "mask_token_id", "target_layer_ids")
    )
