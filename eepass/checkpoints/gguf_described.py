"""What transformers derives from a GGUF file's metadata: configuration and tokenizer, kept."""

from __future__ import annotations

import hashlib
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from eepass.checkpoints.gguf_file import GgufFile
from eepass.checkpoints.holdings import Holdings
from eepass.errors import InputError


def holdings_of_gguf(header: GgufFile) -> Holdings:
    """What the tensors of a file hold."""
    values = sum(tensor.values for tensor in header.tensors)
    return Holdings(str(header.path), len(header.tensors), values)


def described(header: GgufFile, cache: Path) -> Path:
    """The folder in ``cache`` with the configuration and the tokenizer of a file, made once.

    It is named by a hash of the whole header, which is all it is made from: files that say the same
    share it, and a file that is replaced has another.
    """
    import transformers
    from transformers import AutoConfig, GenerationConfig

    key = f"{header.digest} {transformers.__version__}"
    name = hashlib.sha256(key.encode()).hexdigest()[:32]
    target = cache / name
    if (target / "config.json").exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        # a folder of their own: transformers would read the files beside it, too
        header.without_vocabulary(Path(scratch) / "header.gguf")
        header.whole_header(Path(scratch) / "tokenizer.gguf")
        config = AutoConfig.from_pretrained(
            scratch, gguf_file="header.gguf", trust_remote_code=False
        )
        _refuse_scaled_positions(header, config)
        tokenizer = _tokenizer_class(config).from_pretrained(scratch, gguf_file="tokenizer.gguf")
        folder = Path(scratch) / "model"
        config.save_pretrained(folder)
        GenerationConfig.from_model_config(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        # another process may have been first
        with suppress(OSError):
            os.replace(folder, target)
    return target


def _tokenizer_class(config: Any) -> Any:
    """The class that ``AutoTokenizer`` takes for a model of ``config``; it would read the whole
    vocabulary once more to learn which model that is, which takes ten seconds for 150,000 tokens.
    """
    from transformers import TOKENIZER_MAPPING, PreTrainedTokenizerFast

    found = TOKENIZER_MAPPING.get(type(config), None)
    # some versions have pairs: in Python, and fast
    kinds = found if isinstance(found, tuple) else (found,)
    return next((kind for kind in reversed(kinds) if kind is not None), PreTrainedTokenizerFast)


def _refuse_scaled_positions(header: GgufFile, config: object) -> None:
    """Raise where rotary positions are scaled and the configuration does not say so."""
    architecture = header.fields["general.architecture"]
    kind = header.fields.get(f"{architecture}.rope.scaling.type", "none")
    parameters = getattr(config, "rope_parameters", None) or {}
    factor = header.fields.get(f"{architecture}.rope.scaling.factor", 1.0)
    # by kind of layer where there are several kinds
    kinds = [parameters, *(p for p in parameters.values() if isinstance(p, dict))]
    scaled = any(p.get("rope_type", "default") != "default" for p in kinds)
    if kind != "none" and factor != 1.0 and not scaled:
        raise InputError(
            f"{header.path}: its rotary positions are scaled ({kind}, by {factor}), which "
            f"transformers does not read from GGUF files of {architecture}"
        )
