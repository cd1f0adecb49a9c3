"""What commands share: mistakes in one line, figures to ``--json``, the model they work on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import typer

from eepass.cli.causes import machine_cause
from eepass.cli.console import console, errors, progress_bars
from eepass.errors import InputError

# more threads than cores help nobody, and thousands cannot be started
THREADS_PER_CORE, LEAST_THREADS = 4, 64

# as a shell reports a process that SIGINT ended
INTERRUPTED = 130


def command(function: Callable[..., Any], when_stopped: str = "stopped") -> Callable[..., None]:
    """Wrap ``function``, whose options may be ``json_file``, ``threads`` and ``debug``.

    What it returns is written to ``json_file``. What the person can correct is reported in one line
    with exit code 2, unless ``debug`` asks for the traceback; ``when_stopped`` after Ctrl-C. An
    ``artifact`` from the hub is fetched first, and what is returned then names its commit.
    """

    @wraps(function)
    def run(*arguments: Any, **options: Any) -> None:
        file = options.get("json_file")
        try:
            refuse_threads(options.get("threads") or 0)
            refuse_unwritable(file)
            options, source = with_artifact_here(options)
            found = function(*arguments, **options)
            if found is not None and source:
                found = {**found, "artifact": source}
            if found is not None:
                write_json(file, found)
        except KeyboardInterrupt:
            errors.print(when_stopped)
            raise typer.Exit(INTERRUPTED) from None
        except Exception as error:
            said = str(error) if isinstance(error, InputError) else machine_cause(error)
            # EngineError and PassError are ValueErrors, as are refused options
            if said is None and isinstance(error, (ValueError, OSError)):
                said = str(error)
            if said is None or options.get("debug"):
                raise
            errors.print(f"error: {said}", highlight=False, markup=False, soft_wrap=True)
            raise typer.Exit(2) from None

    return run


def resumed_command(function: Callable[..., Any]) -> Callable[..., None]:
    """As ``command``, for what goes on where it was stopped."""
    return command(function, "stopped: run the same command again, and the training resumes")


def with_artifact_here(options: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """``options`` with ``artifact`` as a folder, and what was fetched for it: the id and its
    commit, or nothing."""
    spec = options.get("artifact")
    if spec is None:
        return options, ""
    from eepass.checkpoints.hub_artifact import is_hub_id, pinned

    if not is_hub_id(spec):
        return options, ""
    from eepass.checkpoints.artifact import local_folder

    folder = local_folder(spec)
    source = pinned(spec, folder)
    errors.print(f"artefact: {source}", highlight=False, markup=False, soft_wrap=True)
    return {**options, "artifact": folder}, source


def refuse_threads(threads: int) -> None:
    """Raise ``InputError`` for more threads than a process can start: it would be ended for it."""
    most = max(LEAST_THREADS, THREADS_PER_CORE * (os.cpu_count() or 1))
    for name, value in (
        ("--threads", str(threads)),
        ("OMP_NUM_THREADS=", os.environ.get("OMP_NUM_THREADS", "")),
    ):
        # the variable may hold a list, one number for each level
        first = value.partition(",")[0].strip()
        if first.isdecimal() and int(first) > most:
            raise InputError(f"{name} {value}: at most {most} here, and {os.cpu_count()} are best")


def refuse_unwritable(file: Path | None) -> None:
    """Raise ``InputError`` where ``write_json`` would: before an hour of work, not after it."""
    if file is None:
        return
    if file.is_dir():
        raise InputError(f"{file}: is a folder; --json wants a file")
    folder = next(folder for folder in (file.absolute().parent, *file.absolute().parents)
                  if folder.exists())  # fmt: skip
    if not folder.is_dir():
        raise InputError(f"{file}: cannot be written ({folder} is no folder)")
    if not os.access(file if file.exists() else folder, os.W_OK):
        raise InputError(f"{file}: cannot be written (permission denied)")


def write_json(file: Path | None, value: Any) -> None:
    if file is None:
        return
    from eepass.files import write_text_atomically

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(file, json.dumps(value, indent=1) + "\n")
    except OSError as error:
        raise InputError(f"{file}: cannot be written ({error.strerror})") from error


def load_model(
    model: str,
    dtype: str | None,
    threads: int,
    trust_native: bool = False,
    quantize: str = "none",
    activations: str = "int8",
) -> Any:
    from eepass.codegen.cpu.building import begin_to_build

    # at a first start as long as importing torch and reading the model take together
    begin_to_build()
    import torch

    import eepass

    if threads:
        torch.set_num_threads(threads)
    with console.status(f"loading {model}"):
        kept = None if quantize == "none" else quantize
        loaded = eepass.load(model, dtype, trust_native, kept, activations)
    if "dequantised" in loaded.quantization:
        errors.print(f"{model}: {loaded.quantization}", highlight=False, markup=False)
    return loaded


def calibrate_artifact(loaded: Any, artifact: Path | None = None, **options: Any) -> Any:
    """An artefact with thresholds for ``loaded`` as it is quantised; ``options`` of
    ``eepass.calibrate``."""
    from eepass.training.recalibrate import calibrate

    source = artifact or loaded.unquantized_artifact or loaded.artifact
    if source is None:
        raise InputError(f"{loaded.name} has no artefact to calibrate: give --artifact DIR")
    with progress_bars() as bars:
        return calibrate(loaded, source, progress=bars, **options)


def transform_model(
    loaded: Any,
    artifact: Path | None,
    config: Any,
    max_length: int | None,
    dense: bool = False,
    dump: Path | None = None,
    exits_optional: bool = False,
    drafts_alone: bool = False,
) -> Any:
    from eepass.checkpoints.artifact import load_artifact
    from eepass.model import transform

    folder = None if dense else artifact or loaded.artifact
    if folder is not None and exits_optional and not load_artifact(folder).presets:
        config = None
    if drafts_alone:
        folder = drafts_of(folder)
    if folder is None:
        # what needs no training: exact decoding, drafts from the prompt
        if config.guarantee == "approximate" and (dense or exits_optional):
            config = None
        elif config.guarantee == "approximate" and config.exits:
            raise InputError(
                f"{loaded.name} has no artefact: run eepass train {loaded.name} --out DIR and give "
                "--artifact DIR, or ask for --dense"
            )
    with console.status("tracing, splitting and compiling"):
        return transform(loaded.model, folder, config, max_length, loaded.stop, dump)


def drafts_of(folder: Path | None) -> Any:
    """The draft head of the artefact in ``folder``, for ``--drafts-alone``."""
    from eepass.checkpoints.fitting_artifact import drafts_alone

    if folder is None:
        raise InputError("--drafts-alone: give --artifact DIR, whose draft head is taken")
    return drafts_alone(folder)


def refuse_fixed_options(context: typer.Context, *allowed: str) -> None:
    """Raise ``InputError`` naming the first given option that an exported graph has fixed."""
    for name in context.params:
        source = context.get_parameter_source(name)
        given = source is not None and source.name == "COMMANDLINE"
        if given and name not in (*allowed, "model", "debug", "json_file"):
            option = "--" + name.replace("_", "-")
            raise InputError(
                f"{option}: decided when the graph was exported, or not in ONNX; leave it out, or "
                "give the original model"
            )
