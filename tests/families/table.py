"""Decoder families as small random configurations of transformers' own classes, and what is
expected of each: so many layers, or a refusal with its reason."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

VOCABULARY = 96
TOKENS: dict[str, Any] = {
    "vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256,
}  # fmt: skip
GPT_SIZES: dict[str, Any] = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256}
# windows shorter than the texts of the checks, so that they matter
WINDOW = 8
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
HYBRID = ["linear_attention", "full_attention", "linear_attention"]
MAMBA: dict[str, Any] = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2}
LOCAL_EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED: dict[str, Any] = {
    "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 2,
    "topk_group": 1, "first_k_dense_replace": 1, "moe_intermediate_size": 24,
}  # fmt: skip
LATENT: dict[str, Any] = {
    "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8, "v_head_dim": 8,
}  # fmt: skip
GATED_DELTA: dict[str, Any] = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Family:
    """``model``: class of transformers; ``refused``: words of the reason, where it is refused."""

    model: str
    options: Mapping[str, Any]
    layers: int = 3
    refused: str = ""


def _usual(
    model: str, layers: int = 3, without: tuple[str, ...] = (), refused: str = "", **options: Any
) -> Family:
    sizes = {**TOKENS, **SIZES, "num_hidden_layers": layers, **options}
    return Family(model, {k: v for k, v in sizes.items() if k not in without}, layers, refused)


def _own(model: str, layers: int = 3, refused: str = "", **options: Any) -> Family:
    return Family(model, {**TOKENS, **options}, layers, refused)


NO_HEAD_DIM = ("head_dim",)
STATE_SPACE = "state-space"
ENCODER_DECODER = "encoder-decoder"
DATA_DEPENDENT = "depends on data"
ITS_OWN_CACHE = "cache of its own|in the modules"
FAMILIES: dict[str, Family] = {
    "llama": _usual("LlamaForCausalLM"),
    "mistral": _usual("MistralForCausalLM", sliding_window=WINDOW),
    "ministral": _usual("MinistralForCausalLM", sliding_window=WINDOW),
    "qwen2": _usual("Qwen2ForCausalLM"),
    "qwen3": _usual("Qwen3ForCausalLM"),
    "gemma": _usual("GemmaForCausalLM"),
    "gemma2": _usual("Gemma2ForCausalLM", sliding_window=WINDOW, query_pre_attn_scalar=8),
    "gemma3": _usual(
        "Gemma3ForCausalLM", sliding_window=WINDOW, query_pre_attn_scalar=8, layer_types=MIXED
    ),
    "vaultgemma": _usual("VaultGemmaForCausalLM", sliding_window=WINDOW),
    "phi": _usual("PhiForCausalLM", without=NO_HEAD_DIM),
    "phi3": _usual("Phi3ForCausalLM", without=NO_HEAD_DIM, original_max_position_embeddings=256),
    "phimoe": _usual("PhimoeForCausalLM", without=NO_HEAD_DIM, num_local_experts=4),
    "gpt2": _own("GPT2LMHeadModel", **GPT_SIZES),
    "gpt_bigcode": _own("GPTBigCodeForCausalLM", **GPT_SIZES),
    "gpt_neo": _own(
        "GPTNeoForCausalLM", 4, hidden_size=32, num_layers=4, num_heads=4, intermediate_size=48,
        attention_types=[[["global", "local"], 2]], window_size=WINDOW,
        max_position_embeddings=256,
    ),
    "gpt_neox": _usual("GPTNeoXForCausalLM"),
    "gptj": _own("GPTJForCausalLM", **GPT_SIZES, rotary_dim=4),
    "opt": _own(
        "OPTForCausalLM", hidden_size=32, ffn_dim=48, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=256, word_embed_proj_dim=32,
    ),
    "bloom": _own("BloomForCausalLM", hidden_size=32, n_layer=3, n_head=4),
    "falcon": _own(
        "FalconForCausalLM", hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
        ffn_hidden_size=48,
    ),
    "falcon, alibi": _own(
        "FalconForCausalLM", hidden_size=32, num_hidden_layers=3, num_attention_heads=4, alibi=True,
        new_decoder_architecture=False, multi_query=False, parallel_attn=False,
    ),
    "mpt": _own(
        "MptForCausalLM", d_model=32, n_layers=3, n_heads=4, max_seq_len=256, expansion_ratio=2
    ),
    "olmo": _usual("OlmoForCausalLM"),
    "olmo2": _usual("Olmo2ForCausalLM"),
    "olmo3": _usual("Olmo3ForCausalLM", sliding_window=WINDOW, layer_types=MIXED),
    "olmoe": _usual("OlmoeForCausalLM", **EXPERTS),
    "flex_olmo": _usual("FlexOlmoForCausalLM", **EXPERTS),
    "stablelm": _usual("StableLmForCausalLM", without=NO_HEAD_DIM),
    "granite": _usual("GraniteForCausalLM"),
    "granitemoe": _usual("GraniteMoeForCausalLM", without=NO_HEAD_DIM, **LOCAL_EXPERTS),
    "granitemoeshared": _usual(
        "GraniteMoeSharedForCausalLM", without=NO_HEAD_DIM, shared_intermediate_size=24,
        **LOCAL_EXPERTS,
    ),
    "cohere": _usual("CohereForCausalLM"),
    "cohere2": _usual("Cohere2ForCausalLM", sliding_window=WINDOW, layer_types=MIXED),
    "starcoder2": _usual("Starcoder2ForCausalLM", sliding_window=None),
    "codegen": _own("CodeGenForCausalLM", **GPT_SIZES, n_ctx=256, rotary_dim=4),
    "biogpt": _usual("BioGptForCausalLM", without=NO_HEAD_DIM),
    "xglm": _own(
        "XGLMForCausalLM", d_model=32, ffn_dim=48, num_layers=3, attention_heads=4,
        max_position_embeddings=256,
    ),
    "mixtral": _usual("MixtralForCausalLM", **LOCAL_EXPERTS),
    "qwen2_moe": _usual(
        "Qwen2MoeForCausalLM", moe_intermediate_size=24, shared_expert_intermediate_size=24,
        **EXPERTS,
    ),
    "qwen3_moe": _usual("Qwen3MoeForCausalLM", moe_intermediate_size=24, **EXPERTS),
    "deepseek_v2": _usual("DeepseekV2ForCausalLM", without=NO_HEAD_DIM, **ROUTED, **LATENT),
    "deepseek_v3": _usual("DeepseekV3ForCausalLM", without=NO_HEAD_DIM, **ROUTED, **LATENT),
    "smollm3": _usual("SmolLM3ForCausalLM"),
    "gpt_oss": _usual(
        "GptOssForCausalLM", sliding_window=WINDOW, layer_types=MIXED, **LOCAL_EXPERTS
    ),
    "glm": _usual("GlmForCausalLM"),
    "glm4": _usual("Glm4ForCausalLM"),
    "glm4_moe": _usual("Glm4MoeForCausalLM", **ROUTED),
    "exaone4": _usual("Exaone4ForCausalLM", sliding_window=WINDOW, layer_types=MIXED),
    "ernie4_5": _usual("Ernie4_5ForCausalLM"),
    "ernie4_5_moe": _usual(
        "Ernie4_5_MoeForCausalLM", moe_num_experts=4, moe_k=2, moe_intermediate_size=24,
        moe_layer_start_index=1,
    ),
    "hunyuan": _usual("HunYuanDenseV1ForCausalLM"),
    "hunyuan_moe": _usual("HunYuanMoEV1ForCausalLM", num_experts=4, moe_topk=2),
    "nemotron": _usual("NemotronForCausalLM"),
    "persimmon": _usual("PersimmonForCausalLM", without=NO_HEAD_DIM),
    "arcee": _usual("ArceeForCausalLM"),
    "apertus": _usual("ApertusForCausalLM"),
    "helium": _usual("HeliumForCausalLM"),
    "seed_oss": _usual("SeedOssForCausalLM"),
    "bitnet": _usual("BitNetForCausalLM"),
    "diffllama": _usual("DiffLlamaForCausalLM"),
    "doge": _usual("DogeForCausalLM"),
    "dots1": _usual("Dots1ForCausalLM", **ROUTED),
    "jetmoe": _usual("JetMoeForCausalLM", without=NO_HEAD_DIM, kv_channels=8, **LOCAL_EXPERTS),
    "minimax_m2": _usual("MiniMaxM2ForCausalLM", **LOCAL_EXPERTS),
    "nanochat": _usual("NanoChatForCausalLM"),
    "modernbert_decoder": _usual("ModernBertDecoderForCausalLM", local_attention=WINDOW),
    "bert, decoder": _usual("BertLMHeadModel", without=NO_HEAD_DIM, is_decoder=True),
    "whisper, decoder": _own(
        "WhisperForCausalLM", d_model=32, decoder_layers=3, decoder_attention_heads=4,
        decoder_ffn_dim=48, max_target_positions=256,
    ),
    "llama4": _usual(
        "Llama4ForCausalLM", 4, intermediate_size_mlp=48, num_local_experts=4,
        num_experts_per_tok=1, attention_chunk_size=WINDOW,
    ),
    "qwen3_next": _usual(
        "Qwen3NextForCausalLM", moe_intermediate_size=24, shared_expert_intermediate_size=24,
        layer_types=HYBRID, **EXPERTS, **GATED_DELTA,
    ),
    "qwen3_5": _usual("Qwen3_5ForCausalLM", layer_types=HYBRID, **GATED_DELTA),
    "jamba": _usual(
        "JambaForCausalLM", without=NO_HEAD_DIM, attn_layer_period=2, attn_layer_offset=1,
        expert_layer_period=2, expert_layer_offset=1, mamba_d_state=4, mamba_dt_rank=4,
        **EXPERTS,
    ),
    "bamba": _usual("BambaForCausalLM", without=NO_HEAD_DIM, attn_layer_indices=[1], **MAMBA),
    "granitemoehybrid": _usual(
        "GraniteMoeHybridForCausalLM", without=NO_HEAD_DIM, shared_intermediate_size=24,
        layer_types=["mamba", "attention", "mamba"], **LOCAL_EXPERTS, **MAMBA,
    ),
    "falcon_h1": _usual("FalconH1ForCausalLM", mamba_d_ssm=64, **MAMBA),
    "lfm2": _usual("Lfm2ForCausalLM", layer_types=["conv", "full_attention", "conv"]),
    "recurrent_gemma": _usual(
        "RecurrentGemmaForCausalLM", lru_width=32, attention_window_size=WINDOW,
        refused=ITS_OWN_CACHE,
    ),
    "minimax": _usual(
        "MiniMaxForCausalLM", num_local_experts=4, layer_types=HYBRID, refused=ITS_OWN_CACHE
    ),
    "dbrx": _own(
        "DbrxForCausalLM", d_model=32, n_heads=4, n_layers=3, max_seq_len=256,
        attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        ffn_config={"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
        refused=DATA_DEPENDENT,
    ),
    "longcat_flash": _own(
        "LongcatFlashForCausalLM", 2, hidden_size=32, num_layers=2, num_attention_heads=4,
        ffn_hidden_size=48, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4,
        v_head_dim=8, head_dim=4, n_routed_experts=4, zero_expert_num=2, moe_topk=2,
        expert_ffn_hidden_size=24, refused=DATA_DEPENDENT,
    ),
    "trocr, decoder": _own(
        "TrOCRForCausalLM", d_model=32, decoder_layers=3, decoder_attention_heads=4,
        decoder_ffn_dim=48, max_position_embeddings=256, refused="does not place tokens",
    ),
    "mamba": _own(
        "MambaForCausalLM", hidden_size=32, num_hidden_layers=3, state_size=4, refused=STATE_SPACE
    ),
    "mamba2": _own(
        "Mamba2ForCausalLM", hidden_size=32, num_hidden_layers=3, state_size=4, num_heads=8,
        head_dim=8, refused=STATE_SPACE,
    ),
    "rwkv": _own("RwkvForCausalLM", hidden_size=32, num_hidden_layers=3, refused=STATE_SPACE),
    "xlstm": _own(
        "xLSTMForCausalLM", hidden_size=32, num_hidden_layers=3, num_heads=2, refused=STATE_SPACE
    ),
    "t5": Family(
        "T5ForConditionalGeneration",
        {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3,
         "num_heads": 4},
        refused=ENCODER_DECODER,
    ),
    "bart": Family(
        "BartForConditionalGeneration",
        {"vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 3, "decoder_layers": 3,
         "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48,
         "decoder_ffn_dim": 48},
        refused=ENCODER_DECODER,
    ),
}  # fmt: skip


def tiny_model(family: Family) -> Any:
    """A random model in eval mode, float32; the same weights every time."""
    import transformers

    kind = getattr(transformers, family.model)
    torch.manual_seed(0)
    model = kind(kind.config_class(**family.options))
    # the usual initialisation is too small for layers to disagree
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(4.0)
    return model.eval().requires_grad_(False)
