"""The model a command works on: loaded, calibrated, transformed. Imports torch when called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from eepass.cli.console import console, errors, progress_bars
from eepass.errors import InputError


def load_model(
    model: str,
    dtype: str | None,
    threads: int,
    trust_native: bool = False,
    quantize: str = "none",
) -> Any:
    import torch

    import eepass

    if threads:
        torch.set_num_threads(threads)
    kind = None if quantize == "none" else quantize
    with console.status(f"loading {model}"):
        loaded = eepass.load(model, dtype, trust_native, kind)
    if "dequantised" in loaded.quantization:
        errors.print(f"{model}: {loaded.quantization}", highlight=False, markup=False)
    return loaded


def calibrate_artifact(
    loaded: Any,
    artifact: Path | None,
    out: Path | None = None,
    prompts: Path | None = None,
    tokens: int = 4000,
    raw: bool = False,
) -> Any:
    """An artefact with thresholds for ``loaded`` as it is quantised; written to ``out``."""
    from eepass.training.recalibrate import calibrate

    source = artifact or loaded.unquantized_artifact or loaded.artifact
    if source is None:
        raise InputError(f"{loaded.name} has no artefact to calibrate: give --artifact DIR")
    with progress_bars() as bars:
        return calibrate(loaded, source, out, prompts, tokens, raw, progress=bars)


def transform_model(
    loaded: Any,
    artifact: Path | None,
    config: Any,
    max_length: int | None,
    dense: bool = False,
    dump: Path | None = None,
    exits_optional: bool = False,
) -> Any:
    from eepass.model import transform

    folder = None if dense else artifact or loaded.artifact
    if folder is None:
        # what needs no training: exact decoding, drafts from the prompt
        if config.guarantee == "approximate" and (dense or exits_optional):
            config = None
        exits_optional |= config is None or config.guarantee == "exact"
    if folder is None and not dense and not exits_optional:
        raise InputError(
            f"{loaded.name} has no artefact: run eepass train {loaded.name} --out DIR and give "
            "--artifact DIR, or ask for --dense"
        )
    with console.status("tracing, splitting and compiling"):
        return transform(loaded.model, folder, config, max_length, loaded.stop, dump)
