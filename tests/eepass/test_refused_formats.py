"""AWQ, GPTQ and compressed-tensors checkpoints that are refused: in one line, with the reason."""

import json

import pytest
import torch
from command_line import refused
from foreign_checkpoints import BY_TOKEN, change_config, checkpoint, write

import eepass
from eepass.errors import InputError


def act_order(tensors, config):
    name = "model.layers.1.mlp.down_proj.g_idx"
    tensors[name] = tensors[name][torch.randperm(256)]
    config["desc_act"] = True


def act_order_compressed(tensors, config):
    config["config_groups"]["group_0"]["weights"]["actorder"] = "group"
    tensors["model.layers.0.mlp.up_proj.weight_g_idx"] = torch.arange(128).flip(0).int() // 32


def changed(**values):
    return lambda tensors, config: config.update(values)


def weights(**values):
    return lambda tensors, config: config["config_groups"]["group_0"]["weights"].update(values)


def tensor(name, change):
    def apply(tensors, config):
        name_ = f"model.layers.0.mlp.up_proj.{name}"
        if change is None:
            del tensors[name_]
        else:
            tensors[name_] = change(tensors[name_])

    return apply


def experts(tensors, config):
    tensors["model.layers.0.mlp.experts.0.up_proj.qweight"] = torch.zeros(1)


def inputs_by_tensor(tensors, config):
    scheme = config["config_groups"]["group_0"]
    scheme["input_activations"] = BY_TOKEN | {"strategy": "tensor", "dynamic": False}


REFUSED = {
    "act-order": ("gptq", act_order, r"layers.1.mlp.down_proj.g_idx.*act-order"),
    "act-order of groups": ("pack-quantized", act_order_compressed, "act-order"),
    "bits": ("gptq", changed(bits=3), "3 bits; eepass reads 4 and 8"),
    "bits that are none": ("gptq", changed(bits="four"), "bits is 'four'"),
    "other bits": ("gptq", changed(bits=8), r"qweight is .*\[16, 64\], not .*\[32, 64\]"),
    "layout": ("gptq", changed(checkpoint_format="marlin"), "marlin; eepass reads gptq"),
    "gemv": ("awq", changed(version="gemv"), "gemv; eepass reads version gemm"),
    "awq bits": ("awq", changed(bits=8), "8 bits"),
    "groups": ("awq", changed(group_size=24), "groups of 24"),
    "other groups": ("awq", changed(group_size=64), r"qzeros is .*\[4, 8\], not"),
    "no zeros": ("awq", tensor("qzeros", None), "qzeros is not in the checkpoint"),
    "dtype": ("awq", tensor("qweight", lambda x: x.long()), "qweight is int64"),
    "scales": ("awq", tensor("scales", lambda x: x * float("inf")), "not finite"),
    "experts": ("awq", experts, "no place for .*experts.0.up_proj.qweight.*one by one"),
    "fp8": ("pack-quantized", weights(type="float"), "type float"),
    "2 bits": ("pack-quantized", weights(num_bits=2), "2 bits"),
    "blocks": ("pack-quantized", weights(strategy="block"), "block"),
    "format": ("pack-quantized", changed(format="nvfp4-pack-quantized"), "nvfp4"),
    "cache": ("pack-quantized", changed(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme"),
    "inputs": ("pack-quantized", inputs_by_tensor, "inputs are rounded"),
    "no groups": ("pack-quantized", changed(config_groups=[]), "config_groups"),
    "no target": ("pack-quantized", changed(config_groups={}), "no config group is for it"),
    "shape": (
        "pack-quantized",
        tensor("weight_shape", lambda x: torch.tensor([1 << 40, 1 << 40])),
        r"weight_shape is \[1099511627776",
    ),
    "zero point": ("pack-quantized", tensor("weight_zero_point", None), "weight_zero_point is not"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_the_reason(tmp_path, case):
    form, change, said = REFUSED[case]
    _, _, tensors = checkpoint(tmp_path, form)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    change(tensors, config)
    write(tmp_path, tensors)
    change_config(tmp_path, quantization_config=config)
    with pytest.raises(InputError, match=said) as raised:
        eepass.load(str(tmp_path))
    assert "\n" not in str(raised.value)


def test_damaged_files_are_refused(tmp_path):
    _, _, tensors = checkpoint(tmp_path, "awq", shards=2)
    first, second = sorted(tmp_path.glob("*.safetensors"))
    index = tmp_path / "model.safetensors.index.json"
    places = json.loads(index.read_text())
    usual = ("generate", tmp_path, "--prompt", "w5")
    whole = first.read_bytes()
    # sizes that lie: more than there is, and a header longer than the file
    for data in (whole[:-100], (1 << 62).to_bytes(8, "little") + whole[8:], b""):
        first.write_bytes(data)
        assert f"{first.name}: not a whole safetensors file" in refused(*usual)
    first.write_bytes(whole)
    second.rename(tmp_path / "elsewhere")
    assert f"{second.name}: not a whole safetensors file" in refused(*usual)
    (tmp_path / "elsewhere").rename(second)
    for change, said in (
        ({"weight_map": {"x": "../model.safetensors"}}, "no name of a file beside it"),
        ({"weight_map": {"x": first.name}}, f"x is not in {first.name}"),
        ({"weight_map": []}, "not an index"),
    ):
        index.write_text(json.dumps(places | change))
        assert said in refused(*usual)
    index.unlink()
    assert "2 safetensors files and no" in refused(*usual)
    write(tmp_path, {n: t for n, t in tensors.items() if n != "model.norm.weight"})
    assert "the checkpoint has no model.norm.weight" in refused(*usual)
    write(tmp_path, {n: t for n, t in tensors.items() if "proj" not in n})
    assert "no linear layer has qweight" in refused(*usual)


def test_sizes_that_lie_take_no_memory(tmp_path):
    """The weights of this config would fill hundreds of terabytes."""
    checkpoint(tmp_path, "awq")
    change_config(tmp_path, hidden_size=1 << 22, intermediate_size=1 << 24)
    with pytest.raises(InputError, match=r"q_proj\.qweight is int32|can't allocate"):
        eepass.load(str(tmp_path))
