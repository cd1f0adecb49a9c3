"""EAGLE-3 heads as other trainings leave them, made by hand for the tiny models."""

import json

import torch
import torch.nn.functional as F
from models import VOCABULARY
from safetensors.torch import save_file

HIDDEN, DRAFTED, INNER = 64, 96, 48


def foreign_config(**changes):
    return {
        "architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", "hidden_size": HIDDEN,
        "intermediate_size": INNER, "num_hidden_layers": 1, "num_attention_heads": 4,
        "num_key_value_heads": 2, "hidden_act": "silu", "vocab_size": VOCABULARY,
        "draft_vocab_size": DRAFTED, "max_position_embeddings": 512, "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0, "tie_word_embeddings": False,
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 2, 3]}, **changes,
    }  # fmt: skip


def foreign_tensors(config):
    """As a training elsewhere leaves them, in float16; d2t leads to every token but the first."""
    generator = torch.Generator().manual_seed(7)

    def random(*shape):
        scale = shape[-1] ** -0.5 if len(shape) > 1 else 1.0
        return (torch.randn(*shape, generator=generator) * scale).half()

    hidden, wide = config["hidden_size"], HIDDEN * 3
    width = config.get("head_dim", hidden // 4)
    made = {
        "fc.weight": random(hidden, wide),
        "midlayer.self_attn.q_proj.weight": random(4 * width, 2 * hidden),
        "midlayer.self_attn.k_proj.weight": random(2 * width, 2 * hidden),
        "midlayer.self_attn.v_proj.weight": random(2 * width, 2 * hidden),
        "midlayer.self_attn.o_proj.weight": random(hidden, 4 * width),
        "midlayer.mlp.gate_proj.weight": random(INNER, hidden),
        "midlayer.mlp.up_proj.weight": random(INNER, hidden),
        "midlayer.mlp.down_proj.weight": random(hidden, INNER),
        "midlayer.input_layernorm.weight": random(hidden) + 1,
        "midlayer.hidden_norm.weight": random(hidden) + 1,
        "midlayer.post_attention_layernorm.weight": random(hidden) + 1,
        "norm.weight": random(hidden) + 1,
        "lm_head.weight": random(DRAFTED, hidden),
        "d2t": torch.ones(DRAFTED, dtype=torch.long),
        "t2d": (torch.arange(VOCABULARY) > 0) & (torch.arange(VOCABULARY) <= DRAFTED),
    }
    if config.get("fc_norm"):
        made |= {f"fc_norm.{n}.weight": random(HIDDEN) + 1 for n in range(3)}
    if config.get("norm_before_fc"):
        made["input_norm.weight"] = random(wide) + 1
    if hidden != HIDDEN:
        made["embed_tokens.weight"] = random(VOCABULARY, hidden)
    return made


def write_head(folder, config, tensors):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def as_speculators(config, tensors):
    """The same head as vLLM's library has it."""
    names = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output",
             "draft_vocab_size", "target_hidden_size")  # fmt: skip
    head = {name: config[name] for name in names if name in config}
    layer = {n: v for n, v in config.items() if n not in (*names, "eagle_config")}
    ids = config["eagle_config"]["eagle_aux_hidden_state_layer_ids"]
    renamed = {n.replace("midlayer.", "layers.0."): t for n, t in tensors.items()}
    return {
        "speculators_model_type": "eagle3", "architectures": ["Eagle3Speculator"],
        "transformer_layer_config": layer, "norm_before_residual": False, **head,
        "eagle_aux_hidden_state_layer_ids": ids, "speculators_config": {"algorithm": "eagle3"},
    }, renamed  # fmt: skip


def logits_of(tensors, config, embedding, tokens, features):
    """Of a checkpoint's head after ``tokens`` [T] with ``features`` [T, 3H], as vLLM computes them
    (its llama_eagle3): one layer over all rows at once, attention that sees what came before."""
    w = {n.removesuffix(".weight"): t.float() for n, t in tensors.items()}
    epsilon = config["rms_norm_eps"]
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    width = config.get("head_dim", config["hidden_size"] // heads)

    def norm(x, name):
        return x * (x.pow(2).mean(-1, keepdim=True) + epsilon).rsqrt() * w[name]

    def in_heads(x):
        angle = torch.outer(
            torch.arange(len(tokens)), config["rope_theta"] ** -(torch.arange(0, width, 2) / width)
        ).repeat(1, 2)[:, None]
        x = x.view(len(tokens), -1, width)
        first, second = x.chunk(2, -1)
        return x * angle.cos() + torch.cat([-second, first], -1) * angle.sin()

    if config.get("norm_before_fc"):
        features = norm(features, "input_norm")
    if config.get("fc_norm"):
        parts = features.chunk(3, -1)
        features = torch.cat([norm(x, f"fc_norm.{n}") for n, x in enumerate(parts)], -1)
    hidden = features @ w["fc"].T
    embedded = w.get("embed_tokens", embedding)[tokens]
    normed = norm(hidden, "midlayer.hidden_norm")
    x = torch.cat([norm(embedded, "midlayer.input_layernorm"), normed], -1)
    residual = normed if config.get("norm_before_residual") else hidden
    q, k, v = (x @ w[f"midlayer.self_attn.{n}_proj"].T for n in "qkv")
    q, k, v = in_heads(q), in_heads(k), v.view(len(tokens), -1, width)
    k, v = (part.repeat_interleave(heads // groups, 1) for part in (k, v))
    q, k, v = (part.transpose(0, 1) for part in (q, k, v))
    seen = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1).flatten(1)
    hidden = residual + seen @ w["midlayer.self_attn.o_proj"].T
    x = norm(hidden, "midlayer.post_attention_layernorm")
    gate, up = (x @ w[f"midlayer.mlp.{n}_proj"].T for n in ("gate", "up"))
    hidden = hidden + (F.silu(gate) * up) @ w["midlayer.mlp.down_proj"].T
    return norm(hidden, "norm")[-1] @ w["lm_head"].T
