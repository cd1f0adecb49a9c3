"""Tiny models as llama.cpp's converter writes them."""

import gguf
import numpy as np
from models import tiny_model

KIND = gguf.GGMLQuantizationType
NAMES = {
    "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output",
    "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down",
    "q_norm": "attn_q_norm", "k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def write(
    path, architecture="llama", kinds=(), tied=True, vocabulary=80,
    leave_out=(), more=None, scaling=None,
):  # fmt: skip
    """A tiny model as llama.cpp's converter writes it; ``kinds``: types by a part of the name;
    ``leave_out``: tensors that are missing; ``more``: others; ``scaling`` of positions."""
    # what transformers takes for granted
    width = 128 if architecture == "qwen3" else 64
    model = tiny_model(
        architecture, num_hidden_layers=2, hidden_size=256,
        intermediate_size=512, vocab_size=vocabulary, tie_word_embeddings=tied,
        head_dim=width, num_attention_heads=256 // width, num_key_value_heads=128 // width,
    )  # fmt: skip
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_block_count(2)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(256)
    writer.add_feed_forward_length(512)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    if scaling:
        writer.add_rope_scaling_type(gguf.RopeScalingType(scaling[0]))
        writer.add_rope_scaling_factor(scaling[1])
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    letters = [chr(33 + n) for n in range(vocabulary - 3)]
    writer.add_token_list([*letters, letters[0] + letters[1], "<s>", "</s>"])
    writer.add_token_types([1] * (vocabulary - 2) + [3, 3])
    writer.add_token_scores([0.0] * vocabulary)
    writer.add_token_merges(['! "'])
    writer.add_bos_token_id(vocabulary - 2)
    writer.add_eos_token_id(vocabulary - 1)
    for name, tensor in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        stored, values = gguf_name(name), tensor.float().numpy()
        if stored in leave_out:
            continue
        if architecture == "llama" and ("attn_q" in stored or "attn_k" in stored):
            # converters interleave the halves that rotary embeddings turn
            heads = config.num_attention_heads
            heads = heads if "attn_q" in stored else config.num_key_value_heads
            split = values.reshape(heads, 2, -1, values.shape[1])
            values = split.swapaxes(1, 2).reshape(values.shape)
        kind = next((k for part, k in dict(kinds).items() if part in stored), "F32")
        raw = values if kind == "F32" else blocks(kind, values)
        writer.add_tensor(stored, raw, raw_dtype=KIND[kind])
    for name, values in (more or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_name(name):
    if name == "model.embed_tokens.weight":
        return "token_embd.weight"
    if name in ("model.norm.weight", "lm_head.weight"):
        return {"model.norm.weight": "output_norm.weight"}.get(name, "output.weight")
    parts = name.split(".")
    return f"blk.{parts[2]}.{NAMES[parts[-2]]}.{parts[-1]}"


def blocks(kind, values):
    """Quantised by the package, or, for types that it only reads, random codes."""
    if kind not in ("Q4_K", "Q5_K", "Q6_K", "Q3_K"):
        return gguf.quantize(values, KIND[kind])
    _, size = gguf.GGML_QUANT_SIZES[KIND[kind]]
    random = np.random.default_rng(values.shape[0])
    data = random.integers(0, 256, (values.shape[0], values.shape[1] // 256, size), np.uint8)
    for at in {"Q6_K": (208,), "Q3_K": (108,)}.get(kind, (0, 2)):
        scales = random.normal(0, 1e-3, data.shape[:2]).astype(np.float16)
        data[..., at : at + 2] = scales[..., None].view(np.uint8)
    return data.reshape(values.shape[0], -1)
