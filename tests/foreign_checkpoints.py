"""Small checkpoints as AutoAWQ, GPTQModel and llm-compressor write them, and their weights' values.

Each function follows its format's rules: which numbers are stored, and how they are packed.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from models import tiny_model, tiny_tokenizer
from safetensors.torch import save_file
from torch import Tensor

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
# compressed-tensors' settings for inputs that are rounded token by token
BY_TOKEN = {
    "num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True,
}  # fmt: skip
# the scale of a row of zeros
LEAST = 2**-14


def pack(codes: Tensor, bits: int, order: Any = None) -> Tensor:
    """Words int32 [R, C·bits/32] of codes [R, C]: the first in the lowest bits, or in ``order``."""
    each = 32 // bits
    codes = torch.nn.functional.pad(codes.long(), (0, -codes.shape[1] % each))
    words = torch.zeros(codes.shape[0], codes.shape[1] // each, dtype=torch.long)
    for place, code in enumerate(order or range(each)):
        words |= codes[:, code::each] << (place * bits)
    return words.to(torch.int32)


def quantised(weight: Tensor, bits: int, group: int, symmetric: bool, dtype: torch.dtype) -> Any:
    """Unsigned codes [N, K], zeros and scales [N, G] of a weight, and the values they stand for."""
    columns = weight.shape[1] if group == -1 else min(group, weight.shape[1])
    parts, top = weight.float().unflatten(1, (-1, columns)), 2**bits - 1
    if symmetric:
        scales = (parts.abs().amax(-1) * 2 / top).clamp_min(LEAST).to(dtype)
        zeros = torch.full(scales.shape, (top + 1) // 2)
    else:
        low, high = parts.amin(-1).clamp(max=0), parts.amax(-1).clamp(min=0)
        scales = ((high - low) / top).clamp_min(LEAST).to(dtype)
        zeros = (-low / scales.float()).round().clamp(0, top).long()
    step = scales.float()[..., None]
    codes = ((parts / step).round() + zeros[..., None]).clamp(0, top)
    values = (codes - zeros[..., None]).float() * step
    return codes.flatten(1).long(), zeros, scales, values.flatten(1)


def awq(codes: Tensor, zeros: Tensor, scales: Tensor, bits: int, **_: Any) -> dict[str, Tensor]:
    return {
        "qweight": pack(codes.t(), bits, AWQ_ORDER),
        "qzeros": pack(zeros.t(), bits, AWQ_ORDER),
        "scales": scales.t(),
    }


def gptq(
    codes: Tensor, zeros: Tensor, scales: Tensor, bits: int, version: int = 1, **_: Any
) -> dict[str, Tensor]:
    words, inputs = pack(zeros.t(), bits), codes.shape[1]
    if version == 1:
        # as GPTQModel: whole words at once, so zeros of 0 borrow
        words = (words.long() - sum(1 << at for at in range(0, 32, bits))).to(torch.int32)
    return {
        "qweight": pack(codes, bits).t(),
        "qzeros": words,
        "scales": scales.t(),
        "g_idx": (torch.arange(inputs) // (inputs // scales.shape[1])).int(),
    }


def packed(
    codes: Tensor, zeros: Tensor, scales: Tensor, bits: int, symmetric: bool, **_: Any
) -> dict[str, Tensor]:
    tensors = {
        "weight_packed": pack(codes, bits),
        "weight_scale": scales,
        "weight_shape": torch.tensor(codes.shape),
    }
    return tensors if symmetric else tensors | {"weight_zero_point": pack(zeros.t(), bits).t()}


def bytewise(
    codes: Tensor, zeros: Tensor, scales: Tensor, symmetric: bool, **_: Any
) -> dict[str, Tensor]:
    tensors = {"weight": (codes - 128).to(torch.int8), "weight_scale": scales}
    return tensors if symmetric else tensors | {"weight_zero_point": (zeros - 128).to(torch.int8)}


def awq_config(bits: int, group: int, **_: Any) -> dict[str, Any]:
    return {
        "quant_method": "awq", "bits": bits, "group_size": group, "version": "gemm",
        "zero_point": True,
    }  # fmt: skip


def gptq_config(bits: int, group: int, symmetric: bool, version: int = 1) -> dict[str, Any]:
    return {
        "quant_method": "gptq", "bits": bits, "group_size": group, "sym": symmetric,
        "desc_act": False, "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
    }  # fmt: skip


def compressed_config(
    layout: str, bits: int, group: int, symmetric: bool, inputs: Any = None
) -> dict[str, Any]:
    weights = {
        "num_bits": bits, "type": "int", "symmetric": symmetric, "dynamic": False,
        "strategy": "channel" if group == -1 else "group",
        "group_size": None if group == -1 else group,
    }  # fmt: skip
    scheme = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors", "format": layout, "ignore": ["lm_head"],
        "config_groups": {"group_0": scheme}, "quantization_status": "compressed",
    }  # fmt: skip


def small_model(**changes: Any) -> Any:
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    return tiny_model("llama", **{**sizes, **changes})


def checkpoint(
    folder: Any, form: str, bits: int = 4, group: int = 32, symmetric: bool = False,
    *, model: Any = None, keep: tuple[str, ...] = ("lm_head",), version: int = 1,
    inputs: Any = None, dtype: torch.dtype = torch.float16, shards: int = 1,
) -> tuple[Any, dict[str, Tensor], dict[str, Tensor]]:  # fmt: skip
    """Write a checkpoint of ``model`` into ``folder``, all linear layers but ``keep`` quantised.

    Returns the model with the values its weights stand for, in bf16, those values in float32 by
    layer, and the tensors that were written.
    """
    model = model or small_model()
    for parameter in model.parameters():
        # what is not quantised is stored in float16
        parameter.data = parameter.data.half().float()
    values, tensors = {}, {n: t.half() for n, t in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    writers = {"awq": awq, "gptq": gptq, "pack-quantized": packed, "int-quantized": bytewise}
    for name, linear in model.named_modules():
        if not isinstance(linear, torch.nn.Linear) or name in keep:
            continue
        codes, zeros, scales, values[name] = quantised(linear.weight, bits, group, symmetric, dtype)
        tensors.pop(f"{name}.weight", None)
        parts = writers[form](codes, zeros, scales, bits=bits, symmetric=symmetric, version=version)
        tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
        linear.weight = torch.nn.Parameter(values[name], requires_grad=False)
    config = {
        "awq": lambda: awq_config(bits, group),
        "gptq": lambda: gptq_config(bits, group, symmetric, version),
    }.get(form, lambda: compressed_config(form, bits, group, symmetric, inputs))()
    model.config.save_pretrained(folder)
    change_config(folder, quantization_config=config)
    tiny_tokenizer().save_pretrained(folder)
    write(folder, tensors, shards)
    return model.bfloat16(), values, tensors


def write(folder: Any, tensors: dict[str, Tensor], shards: int = 1) -> None:
    """The tensors in one file, or in several and an index."""
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    tensors = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return
    names, places = sorted(tensors), {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[shard::shards]}
        save_file(part, folder / file, {"format": "pt"})
        places |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def change_config(folder: Any, **changes: Any) -> None:
    """Other values in config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
