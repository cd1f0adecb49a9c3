"""GGUF files: kept as they are quantised, or dequantised, as transformers dequantises them."""

import struct

import numpy as np
import pytest
import torch
from models import tiny_model

import eepass
from eepass.checkpoints.artifact import fingerprint
from eepass.checkpoints.gguf_file import read_header
from eepass.checkpoints.quantized_weights import quantization_of, quantized_layers
from eepass.errors import InputError

gguf = pytest.importorskip("gguf")
KIND = gguf.GGMLQuantizationType
PROMPT = torch.tensor([[5, 9, 44, 7, 8]])
NAMES = {
    "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output",
    "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down",
    "q_norm": "attn_q_norm", "k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    """Configurations derived from a file; compiled kernels stay where they are."""
    from eepass.checkpoints import models

    monkeypatch.setattr(models, "cache_dir", lambda: tmp_path / "cache")


def write(path, architecture="llama", kinds=(), tied=True, vocabulary=80):
    """A tiny model as llama.cpp's converter writes it; ``kinds``: types by a part of the name."""
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
        if architecture == "llama" and ("attn_q" in stored or "attn_k" in stored):
            # converters interleave the halves that rotary embeddings turn
            heads = config.num_attention_heads
            heads = heads if "attn_q" in stored else config.num_key_value_heads
            split = values.reshape(heads, 2, -1, values.shape[1])
            values = split.swapaxes(1, 2).reshape(values.shape)
        kind = next((k for part, k in dict(kinds).items() if part in stored), "F32")
        raw = values if kind == "F32" else blocks(kind, values)
        writer.add_tensor(stored, raw, raw_dtype=KIND[kind])
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


def by_transformers(path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()


MIXED = (
    ("attn_q.", "Q4_0"), ("attn_k.", "Q5_1"), ("attn_v", "Q6_K"), ("attn_output", "Q8_0"),
    ("ffn_gate", "Q4_K"), ("ffn_up", "Q5_K"), ("ffn_down", "Q4_1"), ("token_embd", "Q8_0"),
)  # fmt: skip


@pytest.mark.parametrize("architecture", ("llama", "qwen3"))
@pytest.mark.parametrize("tied", (True, False), ids=("tied", "own head"))
def test_every_type_has_the_values_transformers_gives_it(tmp_path, architecture, tied):
    path = write(tmp_path / "tiny.gguf", architecture, (*MIXED, ("output.weight", "Q5_0")), tied)
    original = by_transformers(path)
    plain = eepass.load(str(path), dtype="fp32")
    for name, tensor in original.state_dict().items():
        assert torch.equal(plain.model.state_dict()[name], tensor), name
    assert plain.quantization == "" and plain.stop >= {79}
    kept = eepass.load(str(path), dtype="fp32", quantize="keep", activations="bf16")
    layers = dict(quantized_layers(kept.model))
    assert len(layers) == 2 * 7 + 1
    for name, layer in layers.items():
        wanted = original.get_submodule(name).weight
        assert torch.equal(layer.quantized.values(torch.float32), wanted), name
    assert layers["lm_head"].tied == tied
    with torch.no_grad():
        expected, found = (m(PROMPT).logits for m in (original, kept.model))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        rounded = eepass.load(str(path), dtype="fp32", quantize="keep").model(PROMPT).logits
    apart = (rounded - expected).abs().max()
    # rounding is another function, a little
    assert 0 < apart < 0.1 * expected.abs().max()
    # an artefact of the one fits the other: they have the same weights
    assert fingerprint(kept.model) == fingerprint(plain.model)


def test_a_type_without_kernels_is_dequantised_and_said(tmp_path):
    path = write(tmp_path / "tiny.gguf", kinds=(("ffn_up", "Q3_K"), ("ffn_down", "Q8_0")))
    loaded = eepass.load(str(path), quantize="keep")
    assert quantization_of(loaded.model) == "2 layers Q8_0"
    assert "2 tensors of Q3_K dequantised" in loaded.quantization


def test_without_kernels_everything_is_dequantised_and_said(tmp_path, monkeypatch):
    from eepass.checkpoints import models, read_gguf

    path = write(tmp_path / "tiny.gguf", kinds=(("ffn_down", "Q4_1"),))
    expected = eepass.load(str(path), dtype="fp32").model.state_dict()
    monkeypatch.setattr(models, "kernel_isa", lambda: "")
    monkeypatch.setattr(read_gguf, "load_kernels", lambda: "no compiler")
    loaded = eepass.load(str(path), dtype="fp32", quantize="keep")
    assert "dequantised: there are no kernels" in loaded.quantization
    for name, tensor in loaded.model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_a_second_start_asks_transformers_for_nothing(tmp_path, monkeypatch):
    path = write(tmp_path / "tiny.gguf", kinds=(("ffn_down", "Q4_1"),))
    first = eepass.load(str(path), quantize="keep")

    def refuse(*_, **__):
        raise AssertionError("the file is described already")

    import transformers.modeling_gguf_pytorch_utils as loader

    for name in ("load_gguf_checkpoint", "get_gguf_hf_weights_map"):
        monkeypatch.setattr(loader, name, refuse)
    again = eepass.load(str(path), quantize="keep")
    with torch.no_grad():
        assert torch.equal(first.model(PROMPT).logits, again.model(PROMPT).logits)
    sizes = [f.stat().st_size for f in (tmp_path / "cache").rglob("*") if f.is_file()]
    # no weights among it
    assert sum(sizes) < path.stat().st_size / 2


def damaged(path, change):
    data = bytearray(path.read_bytes())
    path.write_bytes(change(data))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d[:-2000], "cut short or lies about its sizes"),
        (lambda d: d[:200], "damaged or cut short"),
        (lambda d: b"GGML" + d[4:], "not a GGUF file"),
        (lambda d: d[:4] + struct.pack("<I", 9) + d[8:], "version 9"),
        (lambda d: d[:16] + struct.pack("<Q", 2**60) + d[24:], "damaged or cut short"),
        (lambda d: d.replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_xx.weight"), "no tensor for"),
    ],
)
def test_files_that_lie(tmp_path, change, message):
    path = write(tmp_path / "tiny.gguf")
    damaged(path, change)
    with pytest.raises(InputError, match=message):
        eepass.load(str(path), quantize="keep")


def test_a_tensor_of_another_width_than_its_layer(tmp_path):
    path = write(tmp_path / "tiny.gguf", kinds=(("ffn_down", "Q8_0"),))
    tensor = next(t for t in read_header(path).tensors if "ffn_down" in t.name)
    assert tensor.shape == (256, 512)
    old, new = struct.pack("<QQ", 512, 256), struct.pack("<QQ", 256, 512)
    damaged(path, lambda data: data.replace(old, new))
    with pytest.raises(InputError, match="ffn_down"):
        eepass.load(str(path), quantize="keep")
