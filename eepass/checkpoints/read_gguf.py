"""Load a GGUF file: its quantised matrices packed as they are, or everything dequantised.

transformers knows which tensor of a file is which of a model's, and in which order converters put
rows; its tables are asked here, since its own loader dequantises everything in NumPy. What it
derives from the metadata (configuration, tokenizer) is cached in a folder; weights are not copied.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from eepass.checkpoints.empty_model import empty_model
from eepass.checkpoints.gguf_file import GgufFile, GgufTensor, read_header
from eepass.checkpoints.quantized_weights import QuantizedWeight, replace_linears
from eepass.codegen.cpu.native import load_kernels
from eepass.errors import InputError
from eepass.files import write_text_atomically
from eepass.ops.packing import KINDS, form_number

# numbers of the ``gguf`` package's types that kernels multiply with
PACKED = {2: "q4_0", 3: "q4_1", 6: "q5_0", 7: "q5_1", 8: "q8_0", 12: "q4_k", 13: "q5_k", 14: "q6_k"}
F32, F16, BF16 = 0, 1, 30
HEAD = "output.weight"
EMBEDDING = "token_embd.weight"
# beside the configuration: the model's parameter that each tensor is
NAMES = "tensors.json"


def load_gguf(
    file: Path, dtype: torch.dtype, keep: bool, activations: int, cache: Path
) -> tuple[Any, Any, str]:
    """The model and the tokenizer of ``file``, and which of its types are dequantised ("" if none).

    ``keep``: matrices of linear layers stay quantised. ``activations`` as in ``eepass.ops.packed``.
    ``cache``: where folders with configurations are. Raises ``InputError`` for a file that is
    damaged, or of an architecture that transformers cannot read from GGUF.
    """
    from transformers import AutoTokenizer

    header = read_header(file)
    folder = _described(header, cache)
    model = _described_model(folder, dtype)
    reader = _Weights(model, header, keep, folder / NAMES)
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
    replace_linears(model, reader.packed, activations)
    left = ", ".join(f"{n} tensors of {kind} dequantised" for kind, n in reader.left.items())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return model.eval().requires_grad_(False), tokenizer, left


def _described(header: GgufFile, cache: Path) -> Path:
    """The folder with the configuration and the tokenizer of a file, made once."""
    import transformers
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    stat = header.path.stat()
    key = (str(header.path.resolve()), stat.st_size, stat.st_mtime_ns, transformers.__version__)
    digest = hashlib.sha256(repr(key).encode()).hexdigest()[:16]
    target = cache / f"{header.path.stem}-{digest}"
    if (target / "config.json").exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        header.without_vocabulary(Path(scratch) / "header.gguf")
        config = AutoConfig.from_pretrained(scratch, gguf_file="header.gguf")
        tokenizer = AutoTokenizer.from_pretrained(header.path.parent, gguf_file=header.path.name)
        folder = Path(scratch) / "model"
        config.save_pretrained(folder)
        GenerationConfig.from_model_config(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        # another process may have been first
        with suppress(OSError):
            os.replace(folder, target)
    return target


def _described_model(folder: Path, dtype: torch.dtype) -> Any:
    """The model of a folder's configuration, without weights."""
    from transformers import AutoConfig, GenerationConfig

    model = empty_model(AutoConfig.from_pretrained(folder), dtype)
    model.generation_config = GenerationConfig.from_pretrained(folder)
    model.name_or_path = str(folder)
    return model


def _names(model: Any, processor: Any) -> dict[str, str]:
    """The model's parameter that each of a file's tensors is, by name."""
    import gguf
    from transformers.modeling_gguf_pytorch_utils import get_gguf_hf_weights_map

    # asked anew for each module of the model, which takes seconds
    with mock.patch.object(gguf, "get_tensor_name_map", cache(gguf.get_tensor_name_map)):
        found: dict[str, str] = get_gguf_hf_weights_map(model, processor)
    return found


class _Weights:
    """Reads the tensors of a file: ``packed`` by module, ``values`` by parameter; ``left``: how
    many quantised ones are dequantised, by type."""

    def __init__(self, model: Any, header: GgufFile, keep: bool, names: Path) -> None:
        from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

        self.model, self.header, self.keep = model, header, keep
        # without C++ kernels the gguf package dequantises
        self.kinds = {} if load_kernels() else PACKED
        architecture = header.fields["general.architecture"]
        kind: Any = TENSOR_PROCESSORS.get(architecture, TensorProcessor)
        self.processor = kind(config=model.config.get_text_config(decoder=True).to_dict())
        if not names.exists():
            write_text_atomically(names, json.dumps(_names(model, self.processor)))
        self.names: Mapping[str, str] = json.loads(names.read_text(encoding="utf-8"))
        self.like = dict(model.named_parameters(remove_duplicate=False))
        self.linears = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
        self.packed: dict[str, QuantizedWeight] = {}
        self.values: dict[str, Tensor] = {}
        self.left: Counter[str] = Counter()

    def read(self) -> None:
        has_head = any(tensor.name == HEAD for tensor in self.header.tensors)
        head = next(
            (n for n, m in self.model.named_modules() if m is self.model.get_output_embeddings()),
            "",
        )
        for tensor in self.header.tensors:
            name = self.names.get(tensor.name, "")
            order = self._order(tensor) if name in self.like else None
            if order is None:
                self._as_transformers_does(tensor)
                continue
            self._refuse_other_shape(tensor, name, tensor.shape)
            weight = self._pack(tensor, order)
            module = name.removesuffix(".weight")
            if self.keep and module in self.linears:
                self.packed[module] = weight
                continue
            self.values[name] = weight.values(self.like[name].dtype)
            if self.keep and tensor.name == EMBEDDING and not has_head and head in self.linears:
                self.packed[head] = weight

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

    def _pack(self, tensor: GgufTensor, order: Tensor) -> QuantizedWeight:
        form = form_number(PACKED[tensor.kind])
        blocks = torch.from_numpy(self.header.read(tensor))
        in_order = torch.equal(order, torch.arange(len(order)))
        packed = torch.ops.eepass.pack_gguf(blocks, form, None if in_order else order)
        return QuantizedWeight(packed, form, tensor.shape[0])

    def _as_transformers_does(self, tensor: GgufTensor) -> None:
        made: dict[str, Tensor] = {}
        found = self._process(self._floats(tensor), tensor.name, made)
        if found.name in self.names:
            made[self.names[found.name]] = torch.from_numpy(np.ascontiguousarray(found.weights))
        for name, values in made.items():
            if name in self.like:
                self._refuse_other_shape(tensor, name, values.shape)
                values = values.to(self.like[name].dtype)
            self.values[name] = values
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
        data = self.header.read(tensor)
        if tensor.kind in self.kinds and len(tensor.shape) == 2:
            weight = self._pack(tensor, torch.arange(tensor.shape[0]))
            return weight.values(torch.float32).numpy()
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
