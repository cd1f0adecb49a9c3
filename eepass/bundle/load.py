"""Load a folder that ``eepass transform`` wrote; nothing is traced or compiled."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eepass.bundle.listed_files import ListedFiles
from eepass.bundle.manifest import AGAIN, GRAPHS, read_manifest
from eepass.checkpoints.artifact import load_artifact
from eepass.checkpoints.tokenizer import FILES as TOKENIZER
from eepass.checkpoints.tokenizer import FolderTokenizer
from eepass.checkpoints.weight_memory import settle_weights
from eepass.codegen.compiled_code import CompiledCode
from eepass.codegen.cpu.building import KernelsMissing
from eepass.codegen.cpu.native import open_kernels
from eepass.config import ExitConfig
from eepass.errors import InputError
from eepass.model import ARTIFACT, EarlyExitModel
from eepass.passes.report import PassReport
from eepass.plan import ExitPlan, ExitSegments
from eepass.reading import parse_json
from eepass.stored_graphs import GraphReader

CODE = "code"
KERNELS = "code/kernels.so"
WEIGHTS = "model.safetensors"
# how a description that this version did not write fails
DAMAGED = (TypeError, ValueError, LookupError, AttributeError)
# fields of a configuration that are compiled in, preset by preset
COMPILED_IN = ("draft", "verify", "translators")


def load_folder(
    folder: Path, trust_native: bool = False
) -> tuple[EarlyExitModel, FolderTokenizer, str]:
    """The model in ``folder``, ready to generate, its tokenizer, and its dtype.

    Raises ``InputError`` naming the file that cannot be used, and what to do. ``trust_native``:
    load it, native code and all, even if this user did not sign it.
    """
    manifest = read_manifest(folder, trust_native)
    files = ListedFiles(folder, manifest.files)
    files.require(KERNELS, WEIGHTS, GRAPHS)
    code = {Path(n).name: files.read(n) for n in manifest.files if Path(n).parent == Path(CODE)}
    try:
        open_kernels(folder / KERNELS, code[Path(KERNELS).name])
    except (KernelsMissing, OSError) as error:
        raise InputError(f"{folder / KERNELS}: cannot be used here ({error})") from error
    stored = files.read_tensors(WEIGHTS)
    artifact = None
    if manifest.artifact:
        artifact = load_artifact(folder / ARTIFACT, lambda p: files.read(_within(folder, p)))
    tokenizer = FolderTokenizer(folder, {n: files.read(n) for n in TOKENIZER if n in files})
    described = files.read(GRAPHS)
    for name in manifest.files:
        if not _is_read(name):
            files.check(name)
    try:
        tensors = {name: stored.pop(name) for name in manifest.tensors}
    except KeyError as error:
        raise InputError(f"{folder / WEIGHTS}: does not hold {error} once; {AGAIN}") from error
    settle_weights(tensors.values())
    try:
        graphs = parse_json(described)
        reader = GraphReader(graphs["graphs"])
        splits = {split["rows"]: reader.split(split, tensors) for split in graphs["splits"]}
        if lost := sorted(set(manifest.code.values()) - code.keys()):
            raise ValueError(f"{CODE}/{lost[0]} is not listed")
        exits = graphs["exits"]
    except DAMAGED as error:
        raise _unknown(folder, error) from error
    try:
        model = EarlyExitModel(
            splits, PassReport(), frozenset(manifest.stop), artifact,
            compiler=CompiledCode(folder / CODE, manifest.code, code),
            segments_for=partial(_stored_segments, reader, exits),
            folder=folder,
        )  # fmt: skip
    except (*DAMAGED, RuntimeError) as error:
        # torch's own, of a stored graph that is run here for what depends on positions alone
        raise _unknown(folder, error) from error
    with torch.no_grad():
        model.configure(ExitConfig())
    return model, tokenizer, manifest.dtype


def _unknown(folder: Path, error: Exception) -> InputError:
    return InputError(f"{folder / GRAPHS}: not what this eepass writes ({error}); {AGAIN}")


def _within(folder: Path, file: Path) -> str:
    return file.relative_to(folder).as_posix()


def _is_read(name: str) -> bool:
    """Whether loading reads a file, which checks it, rather than leaving it to others."""
    first = Path(name).parts[0]
    return name in (WEIGHTS, GRAPHS, *TOKENIZER) or first in (CODE, ARTIFACT)


def _stored_segments(
    reader: GraphReader, stored: Mapping[str, Mapping[str, Any]], config: ExitConfig,
    plan: ExitPlan, tensors: Mapping[str, Tensor], rows: int,
) -> ExitSegments:  # fmt: skip
    """The compiled segments of the exits; ``stored``: by preset and row count."""
    preset = ExitConfig.preset(config.name)
    for name in COMPILED_IN:
        if getattr(config, name) != getattr(preset, name):
            raise InputError(
                f"{name}={getattr(config, name)!r}: a transformed folder holds the preset "
                f"{config.name} as it is ({getattr(preset, name)!r}); transform the original"
            )
    segments = reader.exits(stored[config.name][str(rows)])
    wanted = {point.layer for point in plan.exits}
    segments.predictors = {n: p for n, p in segments.predictors.items() if n in wanted}
    return segments
