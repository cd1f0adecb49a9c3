"""Load a GGUF file: its quantised matrices packed as they are, or everything dequantised.

transformers knows which tensor of a file is which of a model's, and in which order converters put
rows; its tables are asked here, since its own loader dequantises everything in NumPy. What it
derives from the metadata (configuration, tokenizer) is cached in a folder; weights are not copied.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eepass.checkpoints.empty_model import empty_model
from eepass.checkpoints.gguf_described import described, holdings_of_gguf
from eepass.checkpoints.gguf_file import GgufFile, GgufTensor, read_header
from eepass.checkpoints.gguf_rotary import FACTORS, divide_frequencies
from eepass.checkpoints.quantized_weights import QuantizedWeight, replace_linears
from eepass.checkpoints.weight_memory import ALIGNMENT, WeightBlock
from eepass.codegen.cpu.native import kernel_isa, load_kernels
from eepass.errors import InputError
from eepass.files import write_text_atomically
from eepass.ops.packing import KINDS, form_number, gguf_packed_shape
from eepass.reading import parse_json

# numbers of the ``gguf`` package's types that kernels multiply with
PACKED = {2: "q4_0", 3: "q4_1", 6: "q5_0", 7: "q5_1", 8: "q8_0", 12: "q4_k", 13: "q5_k", 14: "q6_k"}
F32, F16, BF16 = 0, 1, 30
HEAD = "output.weight"
EMBEDDING = "token_embd.weight"
# halves of one parameter of a model
EXPERTS = re.compile(r"(blk\.\d+\.ffn_)(gate|up)(_exps\..*)")
# beside the configuration: the model's parameter that each tensor is
NAMES = "tensors.json"


def load_gguf(
    file: Path, dtype: torch.dtype, keep: bool, activations: int, cache: Path
) -> tuple[Any, Any, str]:
    """The model and the tokenizer of ``file``, and what of it is dequantised ("" if nothing is).

    ``keep``: matrices of linear layers stay quantised, where there are kernels for them.
    ``activations`` as in ``eepass.ops.packed``. ``cache``: where folders with configurations are.
    Raises ``InputError`` for a file that is damaged, or of an architecture that transformers cannot
    read from GGUF.
    """
    from transformers import AutoTokenizer

    header = read_header(file)
    holdings = holdings_of_gguf(header)
    holdings.refuse_layers(header.fields)
    _refuse_half_experts(header)
    folder = described(header, cache)
    with holdings.bounding():
        model = _described_model(folder, dtype)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    # as late as possible: at a first start the kernels are still being built
    packs = keep and bool(kernel_isa())
    reader = _Weights(model, header, packs, folder / NAMES)
    reader.read()
    model.load_state_dict(reader.values, strict=False, assign=True)
    model.tie_weights()
    missing = [
        name
        for name, parameter in model.named_parameters()
        if parameter.is_meta and name.removesuffix(".weight") not in reader.packed
    ]
    if missing:
        raise InputError(f"{file}: it has no tensor for {missing[0]}")
    divide_frequencies(model, header)
    replace_linears(model, reader.packed, activations)
    left = ", ".join(f"{n} tensors of {kind} dequantised" for kind, n in reader.left.items())
    if keep and not packs:
        left = (
            "dequantised: there are no kernels for quantised weights here (eepass doctor says why)"
        )
    return model.eval().requires_grad_(False), tokenizer, left


def _refuse_half_experts(header: GgufFile) -> None:
    """Raise for gates of experts without their other half, which would be zeros, or the reverse."""
    names = {tensor.name for tensor in header.tensors}
    for name in sorted(names):
        if found := EXPERTS.fullmatch(name):
            other = f"{found[1]}{'up' if found[2] == 'gate' else 'gate'}{found[3]}"
            if other not in names:
                raise InputError(f"{header.path}: it has {name} and no {other}")


def _described_model(folder: Path, dtype: torch.dtype) -> Any:
    """The model of a folder's configuration, without weights."""
    from transformers import AutoConfig, GenerationConfig

    model = empty_model(AutoConfig.from_pretrained(folder, trust_remote_code=False), dtype)
    model.generation_config = GenerationConfig.from_pretrained(folder)
    model.name_or_path = str(folder)
    return model


def _names(model: Any, processor: Any) -> dict[str, str]:
    """The model's parameter that each of a file's tensors is, by name."""
    import gguf

    from eepass.private_names import get_gguf_hf_weights_map

    # transformers asks for it anew for each module of the model, which takes seconds
    asked = gguf.get_tensor_name_map
    gguf.get_tensor_name_map = cache(asked)
    try:
        found: dict[str, str] = get_gguf_hf_weights_map(model, processor)
    finally:
        gguf.get_tensor_name_map = asked
    return found


class _Weights:
    """Reads the tensors of a file: ``packed`` by module, ``values`` by parameter; ``left``: how
    many quantised ones are dequantised, by type."""

    def __init__(self, model: Any, header: GgufFile, keep: bool, names: Path) -> None:
        from eepass.private_names import TENSOR_PROCESSORS, TensorProcessor

        self.model, self.header, self.keep = model, header, keep
        # without C++ kernels the gguf package dequantises
        self.kinds = {} if load_kernels() else PACKED
        architecture = header.fields["general.architecture"]
        kind: Any = TENSOR_PROCESSORS.get(architecture, TensorProcessor)
        self.processor = kind(config=model.config.get_text_config(decoder=True).to_dict())
        if not names.exists():
            write_text_atomically(names, json.dumps(_names(model, self.processor)))
        self.names: Mapping[str, str] = parse_json(names.read_bytes())
        self.like = dict(model.named_parameters(remove_duplicate=False))
        self.buffers = {name for name, _ in model.named_buffers()}
        self.linears = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
        self.position = {name: i for i, name in enumerate(self._in_reading_order())}
        self.block = WeightBlock(sum(map(self._room, header.tensors)))
        self.packed: dict[str, QuantizedWeight] = {}
        self.values: dict[str, Tensor] = {}
        self.left: Counter[str] = Counter()
        # reading into new memory costs as much again: one piece, large enough for all but a few
        sizes = sorted(tensor.size for tensor in header.tensors)
        self._scratch = np.empty(sizes[-1 - len(sizes) // 32], np.uint8)

    def read(self) -> None:
        has_head = any(tensor.name == HEAD for tensor in self.header.tensors)
        head = next(
            (n for n, m in self.model.named_modules() if m is self.model.get_output_embeddings()),
            "",
        )
        tied, last = None, len(self.position)
        # each lies where a pass will read it, behind those of the modules before it
        for tensor in sorted(
            self.header.tensors,
            key=lambda t: self.position.get(self.names.get(t.name, ""), last),
        ):
            if tensor.name == FACTORS:
                # no parameter; see gguf_rotary.py
                continue
            name = self.names.get(tensor.name, "")
            order = self._order(tensor) if name in self.like else None
            if order is None:
                self._as_transformers_does(tensor)
                continue
            self._refuse_other_shape(tensor, name, tensor.shape)
            module = name.removesuffix(".weight")
            if self.keep and module in self.linears:
                self.packed[module] = self._pack(tensor, order, self.block)
                continue
            weight = self._pack(tensor, order)
            self.values[name] = self.block.placed(weight.values(self.like[name].dtype))
            if self.keep and tensor.name == EMBEDDING and not has_head and head in self.linears:
                tied = weight
        if tied is not None:
            self.packed[head] = self._placed(tied)

    def _in_reading_order(self) -> Iterator[str]:
        """The parameters as ``weights_to_read`` will have them, so that none moves again."""
        for name, module in self.model.named_modules():
            own = [f"{name}.{parameter}" if name else parameter for parameter in module._parameters]
            # a quantised layer has its bias before its weight
            yield from reversed(own) if self.keep and name in self.linears else own

    def _room(self, tensor: GgufTensor) -> int:
        """Bytes that a tensor may take up, at most."""
        name = self.names.get(tensor.name, "")
        packed = tensor.size * 5 // 4 if self.keep and tensor.kind in self.kinds else 0
        if name not in self.like or (packed and name.removesuffix(".weight") in self.linears):
            return packed
        return packed + self.like[name].nbytes + ALIGNMENT

    def _placed(self, weight: QuantizedWeight) -> QuantizedWeight:
        return replace(weight, packed=self.block.placed(weight.packed))

    def _order(self, tensor: GgufTensor) -> Tensor | None:
        """The row of the file that each row of the model is; None where that is not all that
        transformers does to this tensor."""
        if tensor.kind not in self.kinds or len(tensor.shape) != 2:
            return None
        rows = np.arange(tensor.shape[0])
        try:
            found = self._process(rows[:, None].copy(), tensor.name, {})
        except (ValueError, IndexError, KeyError):
            # it wants whole rows
            return None
        if found.name != tensor.name or found.weights.shape != (len(rows), 1):
            return None
        order = np.ascontiguousarray(found.weights[:, 0]).astype(np.int64)
        return torch.from_numpy(order) if np.array_equal(np.sort(order), rows) else None

    def _refuse_other_shape(self, tensor: GgufTensor, name: str, shape: Sequence[int]) -> None:
        wanted = self.like[name].shape
        if tuple(shape) != tuple(wanted):
            raise InputError(
                f"{self.header.path}: {tensor.name} is {' x '.join(map(str, shape))}, and the "
                f"configuration wants {' x '.join(map(str, wanted))}"
            )

    def _pack(
        self, tensor: GgufTensor, order: Tensor, block: WeightBlock | None = None
    ) -> QuantizedWeight:
        """A tensor packed, in ``block`` if there is room: a copy would cost as much again."""
        form = form_number(PACKED[tensor.kind])
        blocks = torch.from_numpy(self.header.read(tensor, self._scratch))
        in_order = torch.equal(order, torch.arange(len(order)))
        shape = gguf_packed_shape(blocks, form)
        room = None if block is None else block.room(shape, torch.uint8)
        packed = torch.empty(shape, dtype=torch.uint8) if room is None else room
        torch.ops.eepass.pack_gguf(blocks, form, None if in_order else order, packed)
        return QuantizedWeight(packed, form, tensor.shape[0])

    def _as_transformers_does(self, tensor: GgufTensor) -> None:
        made: dict[str, Tensor] = {}
        found = self._process(self._floats(tensor), tensor.name, made)
        if found.name in self.names:
            made[self.names[found.name]] = torch.from_numpy(np.ascontiguousarray(found.weights))
        elif found.name is not None:
            raise InputError(f"{self.header.path}: the model has no place for {tensor.name}")
        for name, values in made.items():
            if name not in self.like and name not in self.buffers:
                raise InputError(f"{self.header.path}: the model has no place for {tensor.name}")
            if name in self.like:
                self._refuse_other_shape(tensor, name, values.shape)
                values = values.to(self.like[name].dtype)
            # more may still be put into experts
            self.values[name] = values if values.ndim > 2 else self.block.placed(values)
        if tensor.kind not in (F32, F16, BF16) and self.keep:
            from gguf.constants import GGMLQuantizationType

            self.left[GGMLQuantizationType(tensor.kind).name] += 1

    def _process(self, weights: np.ndarray, name: str, made: dict[str, Tensor]) -> Any:
        # experts are put together in `made`, some of them over several tensors
        made |= {n: v for n, v in self.values.items() if v.ndim > 2}
        return self.processor.process(
            weights=weights, name=name, tensor_key_mapping=self.names,
            parsed_parameters={"tensors": made},
        )  # fmt: skip

    def _floats(self, tensor: GgufTensor) -> np.ndarray:
        """The values of a tensor, float32 in its shape."""
        if tensor.kind in self.kinds and len(tensor.shape) == 2:
            weight = self._pack(tensor, torch.arange(tensor.shape[0]))
            return weight.values(torch.float32).numpy()
        data = self.header.read(tensor)
        if tensor.kind == BF16:
            return (
                (data.view(np.uint16).astype(np.uint32) << 16)
                .view(np.float32)
                .reshape(tensor.shape)
            )
        if tensor.kind in (F32, F16):
            values = data.view(np.float32 if tensor.kind == F32 else np.float16)
            return values.astype(np.float32).reshape(tensor.shape)
        from gguf import dequantize
        from gguf.constants import GGMLQuantizationType

        return dequantize(data, GGMLQuantizationType(tensor.kind)).reshape(tensor.shape)


assert set(PACKED.values()) <= set(KINDS)
