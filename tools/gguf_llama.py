"""A Hugging Face Llama and its tokenizer from a GGUF file, without the ``gguf`` package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tools.gguf_file import GgufError, GgufFile

# names in the file -> names in the model; {} is the layer
OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def read_llama(path: Path, dtype: torch.dtype = torch.bfloat16) -> tuple[Any, Any]:
    """Model on the CPU, in eval mode, and tokenizer; ``GgufError`` if the file is not a Llama."""
    file = GgufFile(path)
    architecture = file.metadata.get("general.architecture")
    if architecture != "llama":
        raise GgufError(f"{path}: a {architecture}; only Llamas are read here")
    tokenizer = _tokenizer(file)
    return _model(file, dtype), tokenizer


def _model(file: GgufFile, dtype: torch.dtype) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    def field(name: str) -> Any:
        key = f"llama.{name}"
        if key not in file.metadata:
            raise GgufError(f"{file.path}: {key} is missing")
        return file.metadata[key]

    if "token_embd.weight" not in file.tensors:
        raise GgufError(f"{file.path}: it holds no embedding, so it is a vocabulary, not a model")
    heads, groups = field("attention.head_count"), field("attention.head_count_kv")
    config = LlamaConfig(
        vocab_size=file.tensors["token_embd.weight"].shape[0],
        hidden_size=field("embedding_length"),
        intermediate_size=field("feed_forward_length"),
        num_hidden_layers=field("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=field("rope.dimension_count"),
        max_position_embeddings=field("context_length"),
        rms_norm_eps=field("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": field("rope.freq_base")},
        tie_word_embeddings="output.weight" not in file.tensors,
        bos_token_id=file.metadata.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=file.metadata.get("tokenizer.ggml.eos_token_id"),
        pad_token_id=file.metadata.get("tokenizer.ggml.padding_token_id"),
    )
    weights: dict[str, Tensor] = {}
    for name in file:
        array = file.tensor(name)
        if ".attn_q." in name or ".attn_k." in name:
            array = _halves(array, heads if ".attn_q." in name else groups)
        weights[_name(name, file.path)] = torch.from_numpy(array).to(dtype)
    if config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    # on the meta device: the file's weights are assigned, so none are initialised
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    rotary = type(model.model.rotary_emb)(config)
    missing, unexpected = model.load_state_dict(weights, strict=False, assign=True)
    if missing or unexpected:
        raise GgufError(f"{file.path}: {[*missing, *unexpected]} do not fit a Llama")
    model.tie_weights()
    model.model.rotary_emb = rotary
    model.config.dtype = dtype
    return model.eval().requires_grad_(False)


def _name(name: str, path: Path) -> str:
    if name in OUTER:
        return OUTER[name]
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in LAYER:
        return f"model.layers.{parts[1]}.{LAYER[parts[2]]}.{parts[3]}"
    raise GgufError(f"{path}: no Llama has a {name}")


def _halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head [heads · D, I]: rotary pairs lie next to each other in the file, and a half
    head apart in the model."""
    folded = weight.reshape(heads, weight.shape[0] // heads // 2, 2, weight.shape[1])
    return np.ascontiguousarray(folded.swapaxes(1, 2)).reshape(weight.shape)


def _tokenizer(file: GgufFile) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    data = {
        name.removeprefix("tokenizer.ggml."): value
        for name, value in file.metadata.items()
        if name.startswith("tokenizer.ggml.")
    }
    if (data.get("model"), data.get("pre")) != ("gpt2", "smollm"):
        raise GgufError(
            f"{file.path}: a tokenizer of kind {data.get('model')}/{data.get('pre')}; "
            "read here is gpt2/smollm"
        )
    tokens = data["tokens"]
    merges = [tuple(merge.split(" ")) for merge in data["merges"]]
    made = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    # 3: control tokens, which plain text is never encoded as
    control = [token for token, kind in zip(tokens, data["token_type"], strict=True) if kind == 3]
    made.add_special_tokens([AddedToken(token, special=True) for token in control])
    named = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
    special = {
        role: tokens[data[f"{key}_token_id"]]
        for role, key in named.items()
        if f"{key}_token_id" in data
    }
    fast = PreTrainedTokenizerFast(tokenizer_object=made, **special)
    fast.chat_template = file.metadata.get("tokenizer.chat_template")
    return fast
