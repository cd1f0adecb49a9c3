"""AWQ, GPTQ and compressed-tensors checkpoints: read to the bit, and decoded."""

import json
import sys

import pytest
import torch
from command_line import run
from foreign_checkpoints import BY_TOKEN, change_config, checkpoint, small_model, write

import eepass
from eepass.checkpoints.quantized_weights import QuantizedLinear, grouped, quantized_layers
from eepass.errors import InputError
from eepass.model import transform

PROMPT = [5, 9, 44, 7, 8]
FORMS = {
    "awq": ("awq", 4, 32),
    "awq, groups of 128": ("awq", 4, 128),
    "awq, rows": ("awq", 4, -1),
    "gptq": ("gptq", 4, 32),
    "gptq, groups of 64": ("gptq", 4, 64, True),
    "gptq, rows": ("gptq", 4, -1),
    "gptq, 8 bits": ("gptq", 8, 128),
    "gptq, 8 bits, symmetric": ("gptq", 8, 32, True),
    "packed": ("pack-quantized", 4, 128, True),
    "packed, zeros": ("pack-quantized", 4, 32),
    "packed, channels": ("pack-quantized", 4, -1),
    "packed, 8 bits": ("pack-quantized", 8, 128, True),
    "packed, 8 bits, zeros": ("pack-quantized", 8, 64),
    "int": ("int-quantized", 8, -1, True),
    "int, zeros": ("int-quantized", 8, -1),
    "int, groups": ("int-quantized", 8, 32),
}


def same_weights(loaded, values):
    layers = dict(quantized_layers(loaded.model))
    assert layers.keys() == values.keys()
    for name, layer in layers.items():
        assert torch.equal(layer.quantized.values(torch.float32), values[name]), name


def same_logits(model, original):
    """But for the rounding of what goes through the layers."""
    ids = torch.tensor([PROMPT])
    found, expected = model(ids).logits.float(), original(ids).logits.float()
    assert (found - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("form", FORMS)
def test_values_are_those_of_the_format(tmp_path, form):
    original, values, _ = checkpoint(tmp_path, *FORMS[form])
    loaded = eepass.load(str(tmp_path))
    assert f"int{FORMS[form][1]}" in loaded.quantization
    same_weights(loaded, values)
    plain = original.state_dict()
    for name, tensor in loaded.model.named_parameters():
        assert torch.equal(tensor, plain[name]), name
    same_logits(loaded.model, original)


@pytest.mark.parametrize("version", (1, 2))
def test_the_zeros_of_gptqs_two_versions(tmp_path, version):
    """Version 1 stores them less 1, and a zero of 0 borrows from the next."""
    model = small_model()
    for linear in model.modules():
        if isinstance(linear, torch.nn.Linear):
            # every other output has no weight below 0, so that its zero is 0
            linear.weight.data[::2] = linear.weight.data[::2].abs()
    _, values, tensors = checkpoint(tmp_path, "gptq", model=model, version=version)
    stored = tensors["model.layers.0.mlp.up_proj.qzeros"]
    assert ((stored & 15) == (0 if version == 2 else 15)).all()
    same_weights(eepass.load(str(tmp_path)), values)


def test_scales_in_bfloat16(tmp_path):
    _, values, _ = checkpoint(tmp_path, "pack-quantized", dtype=torch.bfloat16)
    same_weights(eepass.load(str(tmp_path), quantize="keep"), values)


def test_rounded_inputs(tmp_path):
    """compressed-tensors' W8A8: a token's inputs are rounded by their largest, over 127.5."""
    _, values, _ = checkpoint(tmp_path, "int-quantized", 8, -1, True, inputs=BY_TOKEN)
    layers = dict(quantized_layers(eepass.load(str(tmp_path)).model))
    name = "model.layers.1.mlp.up_proj"
    assert layers[name].quantized.dynamic
    x = torch.randn(3, 128).bfloat16()
    step = x.float().abs().amax(1, keepdim=True) / 127.5
    rounded = (x.float() / step).round().clamp(-128, 127) * step
    expected = (rounded @ values[name].T).bfloat16()
    torch.testing.assert_close(layers[name](x), expected, rtol=2**-7, atol=2e-2)


def test_layers_that_are_not_quantised_and_shards(tmp_path):
    keep = ("lm_head", "model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj")
    _, values, _ = checkpoint(tmp_path, "awq", keep=keep, shards=3)
    loaded = eepass.load(str(tmp_path))
    same_weights(loaded, values)
    assert isinstance(loaded.model.model.layers[0].mlp.down_proj, torch.nn.Linear)
    assert not any(p.is_meta for p in loaded.model.parameters())
    with pytest.raises(InputError, match="quantised already"):
        eepass.load(str(tmp_path), quantize="int8")


@pytest.mark.parametrize("keep", (("lm_head",), ()))
def test_heads_tied_to_the_embedding_and_of_their_own(tmp_path, keep):
    model = small_model(tie_word_embeddings=True)
    original, _, _ = checkpoint(tmp_path, "gptq", model=model, keep=keep)
    loaded = eepass.load(str(tmp_path)).model
    assert isinstance(loaded.lm_head, torch.nn.Linear if keep else QuantizedLinear)
    same_logits(loaded, original)
    if keep:
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    else:
        assert not loaded.config.tie_word_embeddings


def test_biases(tmp_path):
    """Those of the model are read; AutoGPTQ writes zeros where it has none."""
    model = small_model(attention_bias=True)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_()
    original, _, tensors = checkpoint(tmp_path, "gptq", model=model)
    extra = "model.layers.0.mlp.up_proj.bias", "model.layers.1.mlp.up_proj.bias"
    # what older checkpoints hold and models compute now
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    tensors |= {extra[0]: torch.zeros(256).half(), extra[1]: torch.ones(256).half()}
    write(tmp_path, tensors)
    loaded = eepass.load(str(tmp_path)).model
    layers = loaded.model.layers
    assert layers[0].mlp.up_proj.bias is None and (layers[1].mlp.up_proj.bias == 1).all()
    bias = original.model.layers[0].self_attn.q_proj.bias
    assert torch.equal(layers[0].self_attn.q_proj.bias, bias)


def test_settings_of_single_layers(tmp_path):
    """GPTQModel's ``dynamic`` and several config groups of compressed-tensors."""
    special = "model.layers.0.mlp.up_proj"
    for form, folder in (("gptq", tmp_path / "a"), ("pack-quantized", tmp_path / "b")):
        _, values, tensors = checkpoint(folder, form)
        _, other, eight = checkpoint(tmp_path / "8", form, 8, 64, model=small_model())
        mixed = {n: t for n, t in tensors.items() if not n.startswith(special)}
        mixed |= {n: t for n, t in eight.items() if n.startswith(special)}
        write(folder, mixed)
        config = json.loads((folder / "config.json").read_text())["quantization_config"]
        if form == "gptq":
            config["dynamic"] = {
                "-:lm_head": {},
                r"+:.*\.0\.mlp\.up": {"bits": 8, "group_size": 64},
            }
        else:
            group = json.loads(json.dumps(config["config_groups"]["group_0"]))
            group["weights"] |= {"num_bits": 8, "group_size": 64}
            config["config_groups"]["group_1"] = group | {"targets": [r"re:.*layers\.0\.mlp\.up"]}
        change_config(folder, quantization_config=config)
        same_weights(eepass.load(str(folder)), values | {special: other[special]})


def test_settings_in_files_of_their_own(tmp_path):
    """As AutoAWQ and AutoGPTQ wrote them before config.json had room for them."""
    for form, name in (("awq", "quant_config.json"), ("gptq", "quantize_config.json")):
        folder = tmp_path / form
        _, values, _ = checkpoint(folder, form)
        config = json.loads((folder / "config.json").read_text())["quantization_config"]
        if form == "awq":
            config = {"w_bit": 4, "q_group_size": 32, "zero_point": True, "version": "GEMM"}
        change_config(folder, quantization_config=None)
        (folder / name).write_text(json.dumps(config))
        same_weights(eepass.load(str(folder)), values)


@pytest.mark.parametrize("form", ("awq, groups of 128", "gptq", "packed, 8 bits"))
def test_decoded(tmp_path, form):
    """Each token is the dequantised model's best, or as good but for rounding."""
    torch.use_deterministic_algorithms(False)
    original, _, _ = checkpoint(tmp_path, *FORMS[form])
    model = transform(eepass.load(str(tmp_path)).model, max_length=64)
    answer = [step.token for step in model.dense.generate(PROMPT, 16)]
    logits = original(torch.tensor([[*PROMPT, *answer]])).logits[0, len(PROMPT) - 1 : -1].float()
    chosen = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
    assert ((logits.amax(1) - chosen) / logits.std(1)).max() < 0.3


def test_on_the_command_line_without_the_formats_libraries(tmp_path):
    checkpoint(tmp_path, "gptq")
    usual = ("--prompt", "w5 w6", "--max-new-tokens", 4)
    code, _, errors = run("generate", tmp_path, *usual, "--json", tmp_path / "said.json")
    assert code == 0, errors
    assert json.loads((tmp_path / "said.json").read_text())
    foreign = ("awq", "auto_gptq", "gptqmodel", "compressed_tensors", "optimum")
    assert not [name for name in sys.modules if name.partition(".")[0] in foreign]


@pytest.mark.slow
def test_a_transformed_folder_answers_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    torch.use_deterministic_algorithms(False)
    checkpoint(tmp_path / "model", "pack-quantized")
    loaded = eepass.load(str(tmp_path / "model"))
    code, _, errors = run("transform", tmp_path / "model", "--out", tmp_path / "out")
    assert code == 0, errors
    models = (transform(loaded.model, max_length=64), eepass.load(str(tmp_path / "out")).model)
    said = [[step.token for step in m.dense.generate(PROMPT, 12)] for m in models]
    assert said[0] == said[1]


def test_grouped():
    """Codes of both widths, with and without zeros that are half the range."""
    for bits in (4, 8):
        codes = torch.randint(0, 1 << bits, (6, 128), dtype=torch.uint8)
        scales = torch.rand(6, 4).half().float()
        for zeros in (torch.full((6, 4), 1 << (bits - 1)), torch.randint(0, 1 << bits, (6, 4))):
            weight = grouped(codes, scales, -(zeros * scales), bits)
            expected = codes.float().unflatten(1, (4, 32)) - zeros[..., None]
            expected = (expected * scales[..., None]).flatten(1)
            assert torch.equal(weight.values(torch.float32), expected)
