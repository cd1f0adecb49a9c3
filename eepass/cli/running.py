"""What commands have in common: load, transform, write figures, say what went wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from eepass.errors import InputError


def load(
    model: str,
    dtype: str | None,
    device: str,
    threads: int,
    trust_native: bool = False,
    quantize: str = "none",
) -> Any:
    import torch

    import eepass
    from eepass.checkpoints.models import check_device
    from eepass.cli.console import console, errors

    check_device(device)
    if threads:
        torch.set_num_threads(threads)
    with console.status(f"loading {model}"):
        wanted = None if quantize == "none" else quantize
        loaded = eepass.load(model, dtype, device, trust_native, wanted)
    if "dequantised" in loaded.quantization:
        errors.print(f"{model}: {loaded.quantization}", highlight=False, markup=False)
    return loaded


def calibrated(
    loaded: Any,
    artifact: Path | None,
    out: Path | None = None,
    prompts: Path | None = None,
    tokens: int = 4000,
    raw: bool = False,
) -> Any:
    from eepass.cli.console import progress_bars
    from eepass.training.recalibrate import calibrate

    source = artifact or loaded.unquantized_artifact or loaded.artifact
    if source is None:
        raise InputError(f"{loaded.name} has no artefact to calibrate: give --artifact DIR")
    with progress_bars() as bars:
        return calibrate(loaded, source, out, prompts, tokens, raw, progress=bars)


def transformed(
    loaded: Any,
    artifact: Path | None,
    dense: bool,
    config: Any,
    max_length: int | None,
    dump: Path | None = None,
    exits_optional: bool = False,
) -> Any:
    from eepass.cli.console import console
    from eepass.model import transform

    folder = None if dense else artifact or loaded.artifact
    if folder is None:
        # what needs no training: lossless, drafts from the prompt
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


def decoder_of(loaded: Any) -> Callable[[list[int]], str]:
    return lambda ids: str(loaded.tokenizer.decode(ids, skip_special_tokens=True))


def write_json(file: Path | None, value: Any) -> None:
    if file is None:
        return
    from eepass.files import write_text_atomically

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(file, json.dumps(value, indent=1) + "\n")
    except OSError as error:
        raise InputError(f"{file}: cannot be written ({error.strerror})") from error


def run(work: Callable[[], None], debug: bool) -> None:
    """Run a command: what the person can mend is one line and exit code 2."""
    from eepass.cli.console import errors

    try:
        work()
    except KeyboardInterrupt:
        errors.print(
            "stopped: run the same command again to go on (a training resumes where it was)"
        )
        raise typer.Exit(2) from None
    except (ValueError, OSError) as error:
        # InputError, EngineError and PassError are ValueErrors, as are refused options
        if debug:
            raise
        errors.print(f"error: {error}", highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(2) from None
