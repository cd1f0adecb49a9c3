"""``eepass export-onnx``: a decoder with its exits as two ONNX graphs over one file of weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

import eepass
from eepass.checkpoints.artifact import Artifact, fingerprint
from eepass.checkpoints.fitting_artifact import artifact_for
from eepass.checkpoints.models import LoadedModel
from eepass.checkpoints.tokenizer import write_tokenizer
from eepass.config import ExitConfig
from eepass.errors import InputError, PassError
from eepass.exit_rule import SCHEDULE_RADIUS, SCHEDULE_WINDOW
from eepass.folders import refuse_other_folder, replacing_folder
from eepass.model import ALWAYS_ACTIVE, PREFILL_ROWS, EarlyExitModel, split_model
from eepass.onnx.files import DECODE, ENTRY, NEVER, PROMPT, WEIGHTS, OnnxMetadata, needed
from eepass.onnx.graph import OnnxBuilder, OnnxValue
from eepass.passes.functional.functional_step import (
    FunctionalDecodeStep,
    FunctionalPromptStep,
    FunctionalStep,
)

# weights are mapped into memory
ALIGNMENT = 4096
Notify = Callable[[str], None]


def export_onnx(
    loaded: LoadedModel,
    out: str | Path,
    artifact: str | Path | Artifact | None = None,
    config: ExitConfig | None = None,
    max_length: int | None = None,
    notify: Notify = lambda stage: None,
) -> dict[str, Any]:
    """Write ``loaded`` (float32) and its exits to the folder ``out``, atomically.

    ``decode.onnx`` runs one token over keys and values that are inputs; ``prefill.onnx`` runs the
    prompt; both read ``weights.bin``; the tokenizer lies beside them. ``config``: an approximate
    one with KV policy ``propagate`` (the default) or ``drop``. ``max_length``: prompt and answer
    together. Returns a report. Raises ``InputError`` with the reason for what cannot be exported.
    """
    for module in ("onnx", "onnx_ir", "onnxscript"):
        needed(module)
    began = perf_counter()
    target = Path(out).resolve()
    refuse_other_folder(target, _is_exported)
    config = config or propagating()
    notify("tracing and splitting")
    try:
        with torch.no_grad():
            model = _configured(loaded, artifact, config, max_length)
            split, parts = model.splits[1], model.exit_parts(config)
            assert parts is not None
            always = ALWAYS_ACTIVE if config.schedule else None
            decode = FunctionalDecodeStep(split, parts.segments(1), parts.plan, always)
            prefill = FunctionalPromptStep(model.splits[max(model.splits)], split)
    except PassError as error:
        raise InputError(f"{loaded.name} cannot be exported to ONNX: {error}") from error
    described = _metadata(loaded, model, config, prefill.split.rows)
    tensors = {**model.decoder.tensors, **parts.tensors}
    with replacing_folder(target, _is_exported) as folder:
        write_tokenizer(loaded, folder)
        notify("exporting the decode step")
        models = {DECODE: _decode_graph(decode, tensors)}
        notify("exporting the prompt step")
        models[PROMPT] = _prompt_graph(prefill, tensors)
        notify("writing and checking")
        _write(folder, models, described, tensors)
        files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    return {"files": files, **described, "seconds": round(perf_counter() - began, 1)}


def _is_exported(folder: Path) -> bool:
    return (folder / DECODE).exists()


def propagating() -> ExitConfig:
    """The default of ``export_onnx``: the default preset with KV policy ``propagate``."""
    return replace(ExitConfig().approximate(), kv="propagate")


def _configured(
    loaded: LoadedModel, artifact: str | Path | Artifact | None, config: ExitConfig,
    max_length: int | None,
) -> EarlyExitModel:  # fmt: skip
    """The transformed model, of which nothing is compiled."""
    if config.context != "full":
        raise InputError(f"context={config.context!r}: an exported graph attends to all of a text")
    model = loaded.model
    if isinstance(model, EarlyExitModel):
        ready = _transformed(model, artifact, max_length)
    else:
        chosen = artifact if artifact is not None else loaded.artifact
        if chosen is None:
            raise InputError(
                f"{loaded.name} has no artefact: run eepass train {loaded.name} --out DIR and give "
                "--artifact DIR"
            )
        trained = artifact_for(model, chosen)
        _refuse_dtype(loaded, next(model.parameters()).dtype)
        splits, report = split_model(model, max_length, (1,))
        if PREFILL_ROWS not in splits:
            raise PassError("its recurrent states are overwritten in place, token by token")
        ready = EarlyExitModel(splits, report, loaded.stop, trained, compiler=_no_compiler)
    _refuse_dtype(loaded, ready.splits[1].hidden_example.dtype)
    ready.configure(config)
    return ready


def _refuse_dtype(loaded: LoadedModel, dtype: torch.dtype) -> None:
    if dtype is not torch.float32:
        raise InputError(f"{loaded.name} is in {dtype}: ONNX is written in fp32, give it in fp32")


def _transformed(
    model: EarlyExitModel, artifact: str | Path | Artifact | None, max_length: int | None
) -> EarlyExitModel:
    own = model.artifact_folder
    if isinstance(artifact, Artifact) or (artifact is not None and Path(artifact).resolve() != own):
        raise InputError("a transformed folder has its own artefact, compiled in")
    if not model.has_exits:
        raise InputError(f"{model.folder}: transformed without exits; transform with an artefact")
    if max_length is not None and max_length > model.decoder.capacity:
        raise InputError(
            f"max_length={max_length}: {model.folder} was transformed for "
            f"{model.decoder.capacity} tokens"
        )
    return model


def _no_compiler(*_: Any, **__: Any) -> Any:
    raise RuntimeError("an exported model is not compiled")


def _metadata(
    loaded: LoadedModel, model: EarlyExitModel, config: ExitConfig, prompt_rows: int
) -> dict[str, Any]:
    plan, slots = model.plan, model.splits[1].cache_length
    assert plan is not None and model.artifact is not None
    known = model.artifact.fingerprint
    return {
        "name": loaded.name,
        "eepass": eepass.__version__,
        "fingerprint": dict(known if loaded.transformed else fingerprint(loaded.model)),
        "layers": plan.num_layers,
        "max_length": slots - prompt_rows,
        "slots": slots,
        "prompt_rows": prompt_rows,
        "stop": sorted(loaded.stop),
        "kv_policy": plan.kv_policy,
        "verify": plan.verify,
        "preset": config.name,
        "target_agreement": config.target_agreement,
        "draft_layer": plan.draft_layer,
        "draft_tokens": plan.draft_tokens,
        "exits": {str(point.layer): point.threshold for point in plan.exits},
        "window": SCHEDULE_WINDOW,
        # without a schedule every predictor is active
        "radius": SCHEDULE_RADIUS if config.schedule else plan.num_layers,
        "always": ALWAYS_ACTIVE,
    }


def _decode_graph(step: FunctionalDecodeStep, tensors: Mapping[str, Tensor]) -> Any:
    build = OnnxBuilder("decode", tensors)
    limits = torch.full((step.plan.num_layers + 1,), NEVER)
    for point in step.plan.exits:
        limits[point.layer] = point.threshold
    ids = build.input("ids", torch.zeros(1, 1, dtype=torch.long))
    position = build.input("position", torch.zeros(1, dtype=torch.long))
    recent = build.input("recent", torch.zeros(SCHEDULE_WINDOW, dtype=torch.long))
    threshold = build.input("threshold", limits, default=True)
    outputs = step.build(build, ids, position, recent, threshold, _caches(build, step))
    return _finished(build, step, ("token", "exit_layer", "new_recent"), outputs)


def _prompt_graph(step: FunctionalPromptStep, tensors: Mapping[str, Tensor]) -> Any:
    build = OnnxBuilder("prefill", tensors)
    ids = build.input("ids", torch.zeros(1, step.split.rows, dtype=torch.long))
    start = build.input("start", torch.zeros(1, dtype=torch.long))
    last = build.input("last", torch.zeros(1, dtype=torch.long))
    outputs = step.build(build, ids, start, last, _caches(build, step))
    return _finished(build, step, ("token",), outputs)


def _caches(build: OnnxBuilder, step: FunctionalStep) -> list[OnnxValue]:
    empty = step.empty_caches()
    return [build.input(r.name, like) for r, like in zip(step.caches, empty, strict=True)]


def _finished(
    build: OnnxBuilder, step: FunctionalStep, names: Sequence[str], outputs: Sequence[OnnxValue]
) -> Any:
    rows = [f"new_{role.name}" for role in step.caches]
    return build.finish(dict(zip([*names, *rows], outputs, strict=True)))


def _write(
    folder: Path, models: Mapping[str, Any], metadata: dict[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Write ``models`` by file name, and one file of the ``tensors`` they read, whose size is added
    to ``metadata``."""
    import onnx
    import onnx_ir

    initializers = [model.graph.initializers for model in models.values()]
    read = [name for name in tensors if any(name in own for own in initializers)]
    arrays = [
        onnx_ir.Tensor(tensors[name].detach().contiguous().numpy(), name=name) for name in read
    ]
    written = onnx_ir.external_data.convert_tensors_to_external(
        arrays, folder, WEIGHTS, alignment=ALIGNMENT
    )
    metadata["weights"] = (folder / WEIGHTS).stat().st_size
    for file, model in models.items():
        model.metadata_props[ENTRY] = OnnxMetadata(**metadata).to_json()
        for name, tensor in zip(read, written, strict=True):
            if name in model.graph.initializers:
                model.graph.initializers[name].const_value = tensor
        onnx_ir.save(model, folder / file)
        onnx.checker.check_model(str(folder / file), full_check=True)
