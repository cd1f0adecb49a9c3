"""GGUF files: kept as they are quantised, or dequantised, as transformers dequantises them."""

import json
import mmap
import os
import struct

import numpy as np
import pytest
import torch
from command_line import refused, run
from gguf_files import write

import eepass
from eepass.checkpoints.artifact import fingerprint
from eepass.checkpoints.gguf_file import read_header
from eepass.checkpoints.quantized_weights import quantization_of, quantized_layers, weights_to_read
from eepass.checkpoints.weight_memory import settle_weights
from eepass.errors import InputError

PROMPT = torch.tensor([[5, 9, 44, 7, 8]])


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    """Configurations derived from a file; compiled kernels stay where they are."""
    from eepass.checkpoints import models

    monkeypatch.setattr(models, "cache_dir", lambda: tmp_path / "cache")


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


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="no large pages here")
@pytest.mark.parametrize("quantize", (None, "keep"))
@pytest.mark.parametrize("tied", (True, False), ids=("tied", "own head"))
def test_weights_are_read_to_where_a_pass_reads_them(tmp_path, quantize, tied):
    path = write(tmp_path / "tiny.gguf", "qwen3", (*MIXED, ("output.weight", "Q5_0")), tied)
    weights = weights_to_read(eepass.load(str(path), quantize=quantize).model)
    addresses = [weight.data_ptr() for weight in weights]
    assert settle_weights(weights)
    assert [weight.data_ptr() for weight in weights] == addresses


def test_a_file_that_is_cut_while_it_is_read(tmp_path):
    path = write(tmp_path / "tiny.gguf")
    header = read_header(path)
    os.truncate(path, path.stat().st_size - 64)
    with pytest.raises(InputError, match="become shorter"):
        for tensor in header.tensors:
            header.read(tensor, np.empty(100, np.uint8))


def test_training_on_the_weights_as_they_are_kept(tmp_path):
    path = write(tmp_path / "tiny.gguf", kinds=MIXED)
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out"
    letters = [chr(97 + n) for n in range(25)]
    texts = ["".join(letters[(n + 3 * k) % 25] for k in range(8)) for n in range(25)]
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    command = ("train", path, "--out", out, "--prompts", prompts, "--tokens", 1500, "--samples", 1,
               "--max-length", 64, "--draft", "none", "--dtype", "fp32", "--raw")  # fmt: skip
    code, _, errors = run(*command, "--quantize", "keep")
    assert code == 0, errors
    assert "Q6_K" in eepass.load_artifact(out).report["quantized"]
    for quantize in ("keep", None):
        loaded = eepass.load(str(path), dtype="fp32", quantize=quantize)
        assert eepass.transform(loaded.model, out, max_length=64).artifact is not None
    # answers of other weights are not mixed with these
    assert "other quantized" in refused(*command)


def test_a_type_without_kernels_is_dequantised_and_said(tmp_path):
    path = write(tmp_path / "tiny.gguf", kinds=(("ffn_up", "Q3_K"), ("ffn_down", "Q8_0")))
    loaded = eepass.load(str(path), quantize="keep")
    assert quantization_of(loaded.model) == "2 layers Q8_0"
    assert "2 tensors of Q3_K dequantised" in loaded.quantization


def test_without_kernels_everything_is_dequantised_and_said(tmp_path, monkeypatch):
    from eepass.checkpoints import read_gguf

    path = write(tmp_path / "tiny.gguf", kinds=(("ffn_down", "Q4_1"),))
    expected = eepass.load(str(path), dtype="fp32").model.state_dict()
    monkeypatch.setattr(read_gguf, "kernel_isa", lambda: "")
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
        (
            lambda d: d.replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_xx.weight"),
            "no place for blk.1.ffn_xx.weight",
        ),
        (
            lambda d: d.replace(b"blk.1.attn_q.weight", b"blk.1.attn_k.weight"),
            "attn_k.weight is there twice",
        ),
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


def change_number(data, key, value):
    """The same file with another value of a 32-bit number in its metadata."""
    at = data.index(key.encode()) + len(key) + 4
    return data[:at] + struct.pack("<I", value) + data[at + 4 :]


def test_a_file_replaced_within_the_clocks_resolution_is_read_anew(tmp_path):
    path = write(tmp_path / "tiny.gguf")
    first, stat = path.read_bytes(), path.stat()
    assert eepass.load(str(path)).model.config.rope_parameters["rope_theta"] == 10000.0
    path.write_bytes(first.replace(struct.pack("<f", 10000.0), struct.pack("<f", 20000.0)))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_mtime_ns == stat.st_mtime_ns and path.stat().st_size == stat.st_size
    assert eepass.load(str(path)).model.config.rope_parameters["rope_theta"] == 20000.0
    # of the same name, in another folder, with the same times
    (tmp_path / "other").mkdir()
    other = tmp_path / "other" / "tiny.gguf"
    other.write_bytes(first)
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert eepass.load(str(other)).model.config.rope_parameters["rope_theta"] == 10000.0


def test_files_beside_it_say_nothing_about_it(tmp_path):
    path = write(tmp_path / "tiny.gguf")
    lie = {"chat_template": "{{ 'beside' }}", "auto_map": {"AutoTokenizer": ["code.Own", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(lie))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    loaded = eepass.load(str(path))
    assert loaded.tokenizer.chat_template is None and loaded.model.config.model_type == "llama"


def test_a_missing_tensor_is_named(tmp_path):
    path = write(tmp_path / "tiny.gguf", leave_out=("blk.1.ffn_up.weight",))
    with pytest.raises(InputError, match=r"no tensor for model\.layers\.1\.mlp\.up_proj\.weight"):
        eepass.load(str(path))


def test_more_layers_than_there_are_tensors_for(tmp_path):
    path = write(tmp_path / "tiny.gguf")
    whole = path.read_bytes()
    for count in (1 << 30, 3):
        path.write_bytes(change_number(whole, "llama.block_count", count))
        with pytest.raises(
            InputError, match=r"block_count is 1073741824|no tensor for model\.layers\.2"
        ):
            eepass.load(str(path))
    path.write_bytes(change_number(whole, "llama.feed_forward_length", 1 << 30))
    with pytest.raises(InputError, match=r"more than the .* values"):
        eepass.load(str(path))


def test_a_file_that_only_names_its_architecture_builds_nothing(tmp_path):
    name, value = b"general.architecture", b"llama"
    field = struct.pack("<Q", len(name)) + name + struct.pack("<IQ", 8, len(value)) + value
    path = tmp_path / "bare.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + field)
    with pytest.raises(InputError, match="it has no tensors"):
        eepass.load(str(path))


def test_lists_in_lists_without_end(tmp_path):
    name = b"x"
    field = struct.pack("<Q", 1) + name + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 10000
    path = tmp_path / "deep.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + field)
    with pytest.raises(InputError, match="damaged"):
        eepass.load(str(path))


def test_rotary_frequencies_are_divided_by_the_files_factors(tmp_path):
    """transformers' loader leaves rope_freqs.weight out, and decodes another function."""
    factors = np.linspace(1, 8, 32).astype(np.float32)
    plain = eepass.load(str(write(tmp_path / "plain.gguf")), dtype="fp32").model
    scaled = eepass.load(
        str(write(tmp_path / "scaled.gguf", more={"rope_freqs.weight": factors})), dtype="fp32"
    ).model
    rotary, divided = plain.model.rotary_emb, scaled.model.rotary_emb
    assert torch.equal(divided.inv_freq, rotary.inv_freq / torch.from_numpy(factors))
    # what is kept for the one is not the other's
    assert plain.config.to_dict() != scaled.config.to_dict()
    with pytest.raises(InputError, match=r"no place for rope_freqs.weight"):
        eepass.load(str(write(tmp_path / "wide.gguf", more={"rope_freqs.weight": factors[:7]})))
    with pytest.raises(InputError, match=r"no place for rope_factors_long.weight"):
        eepass.load(str(write(tmp_path / "x.gguf", more={"rope_factors_long.weight": factors})))


def test_scaled_positions_that_transformers_leaves_out(tmp_path):
    path = write(tmp_path / "tiny.gguf", scaling=("yarn", 4.0))
    with pytest.raises(InputError, match="positions are scaled"):
        eepass.load(str(path))
