"""``eepass transform``: write a model as a folder that runs without tracing or compiling."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

import eepass
from eepass import inspecting, pictures
from eepass.bundle import signing
from eepass.bundle.gpu_kernels import HOME, capability_of, compile_split
from eepass.bundle.load import CODE, KERNELS, WEIGHTS
from eepass.bundle.manifest import GRAPHS, is_transformed, write_manifest
from eepass.checkpoints.artifact import MANIFEST as TRAINED
from eepass.checkpoints.artifact import Artifact, fingerprint
from eepass.checkpoints.fitting_artifact import artifact_for
from eepass.checkpoints.models import LoadedModel
from eepass.checkpoints.tokenizer import FILES as TOKENIZER
from eepass.checkpoints.tokenizer import write_tokenizer
from eepass.codegen.compile_ahead import AheadCompiler, CannotCompileAhead
from eepass.codegen.cpu.building import KernelsMissing
from eepass.config import ExitConfig
from eepass.errors import InputError
from eepass.files import save_tensors
from eepass.folders import refuse_other_folder, replacing_folder
from eepass.model import ARTIFACT, STEP_ROWS, EarlyExitModel, split_model
from eepass.runtime.exits.exits import ROW_COUNTS
from eepass.stored_graphs import GraphWriter, NotStorable

EXIT_GRAPH = "exit_graph.pt2"
REPORT = "report.json"
PICTURE = "exit_graph.svg"
MOST_ROWS = 32
Notify = Callable[[str], None]


def write_folder(
    loaded: LoadedModel,
    out: str | Path,
    artifact: str | Path | Artifact | None = None,
    rows: Sequence[int] = STEP_ROWS,
    max_length: int | None = None,
    notify: Notify = lambda stage: None,
    gpus: Sequence[str] = (),
) -> dict[str, Any]:
    """Transform ``loaded`` and write it to the folder ``out``, whole or not at all; returns the
    report.

    ``artifact``: one that ``eepass.train`` wrote; without one no token exits early. ``rows``: the
    row counts passes are compiled for, including 1. ``max_length``: prompt and answer together,
    1024 by default. ``notify(stage)`` is called as each stage begins. ``gpus``: targets ("sm_90")
    whose kernels are added to the folder, where ``ready_kernels`` finds them. An existing
    transformed folder is replaced. Raises ``InputError`` for a model, artefact or folder that
    cannot be used, with the reason.
    """
    for gpu in gpus:
        capability_of(gpu, "--gpu")
    target = Path(out).resolve()
    sizes = _checked(loaded, target, rows)
    trained = None if artifact is None else artifact_for(loaded.model, artifact)
    # a key that cannot be used is said before minutes of work, not after them
    signing.ready_to_sign()
    try:
        with replacing_folder(target, is_transformed) as folder, torch.no_grad():
            return _Writer(loaded, folder, trained, notify, gpus).write(sizes, max_length)
    except (CannotCompileAhead, NotStorable, KernelsMissing) as error:
        raise InputError(f"{loaded.name} cannot be compiled ahead of time: {error}") from error


@dataclass(frozen=True, slots=True)
class _Writer:
    loaded: LoadedModel
    folder: Path
    artifact: Artifact | None
    notify: Notify
    gpus: Sequence[str]

    def write(self, rows: Sequence[int], max_length: int | None) -> dict[str, Any]:
        began = perf_counter()
        model = self.loaded.model
        write_tokenizer(self.loaded, self.folder)
        self.loaded.model.generation_config.save_pretrained(self.folder)
        # compiled code expects the strides it was compiled for, and stored tensors are contiguous
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.contiguous()
        self.notify("tracing and splitting")
        splits, report = split_model(model, max_length, rows)
        compiler = AheadCompiler(self.folder / CODE)
        ready = EarlyExitModel(splits, report, self.loaded.stop, self.artifact, compiler=compiler)
        writer = GraphWriter()
        graphs: dict[str, Any] = {
            "splits": [writer.parts(split) for split in ready.decoder.splits.values()],
            "exits": {},
            "graphs": writer.graphs,
        }
        self._compile_layers(ready)
        for preset in self.artifact.presets if self.artifact else ():
            segments = self._compile_exits(ready, preset)
            graphs["exits"][preset] = {str(n): writer.parts(p) for n, p in segments.items()}
        if self.artifact is not None and not ready.has_exits:
            self.notify("compiling drafts")
            drafting: Any = ready.configure(ExitConfig())
            drafting.draft.call_seconds()
        (self.folder / GRAPHS).write_text(json.dumps(graphs), encoding="utf-8")
        kernels = {gpu: self._compile_for(gpu, ready) for gpu in self.gpus}
        self.notify("writing weights, exit graph and report")
        tensors = {name: tensor.detach() for name, tensor in ready.decoder.tensors.items()}
        save_tensors(self.folder / WEIGHTS, tensors)
        if self.artifact is not None:
            self.artifact.save(self.folder / ARTIFACT)
        found = self._report(ready)
        found["gpu_kernels"] = kernels
        found["seconds"] = round(perf_counter() - began, 1)
        (self.folder / REPORT).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        decoder, loaded = ready.decoder, self.loaded
        needed = [GRAPHS, WEIGHTS, KERNELS, *TOKENIZER[:2]]
        needed += [f"{CODE}/{file}" for file in compiler.files.values()]
        write_manifest(
            self.folder,
            needed + ([f"{ARTIFACT}/{TRAINED}"] if self.artifact else []),
            name=loaded.name,
            eepass=eepass.__version__,
            threads=torch.get_num_threads(),
            fingerprint=fingerprint(model),
            dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
            max_length=decoder.max_sequence_length,
            rows=list(decoder.buckets),
            stop=sorted(loaded.stop),
            artifact=self.artifact is not None,
            code=compiler.files,
            tensors=list(decoder.tensors),
        )
        return found

    def _compile_layers(self, ready: EarlyExitModel) -> None:
        decoder = ready.decoder
        for rows in decoder.buckets:
            self.notify(f"compiling layers and head for {rows} rows")
            decoder.prepare(rows)
            decoder.prepare_head(rows)
        self.notify("compiling KV fills")
        decoder.prepare_fills()

    def _compile_exits(self, ready: EarlyExitModel, preset: str) -> dict[int, Any]:
        self.notify(f"compiling exits and drafts of the preset {preset}")
        # one threshold for all, so that every trained exit is in the plan
        config = replace(ExitConfig.preset(preset), threshold=0.5)
        engine: Any = ready.configure(config)
        parts = ready.exit_parts(config)
        assert parts is not None
        engine.exits.prepare(max(ROW_COUNTS))
        if engine.draft is not None:
            # compiles it, since it runs once with each number of rows
            engine.draft.call_seconds()
        return {rows: parts.segments(rows) for rows in ROW_COUNTS}

    def _compile_for(self, gpu: str, ready: EarlyExitModel) -> dict[str, Any]:
        self.notify(f"compiling kernels for {gpu}")
        rows = [count for count in ready.decoder.buckets if count <= MOST_ROWS]
        home = self.folder / HOME / gpu
        made = compile_split(ready.splits[1], self.artifact, gpu, rows, home)
        return {"kernels": len(made["kernels"]), "not_generated": made["not_generated"]}

    def _report(self, ready: EarlyExitModel) -> dict[str, Any]:
        ready.configure(ExitConfig().approximate() if ready.has_exits else ExitConfig())
        found = inspecting.describe(ready)
        pictures.exit_graph(ready.splits[1], ready.plan, self.folder / PICTURE, self.loaded.name)
        if not ready.has_exits:
            found["exit_graph"] = "none: without an artefact that has exits no token exits early"
        else:
            segment = inspecting.exit_graph_of(ready)
            assert segment is not None
            # for other programs; tensors without values: the weights too are inputs, named by
            # role, and lie in the folder beside it
            examples = tuple(segment.examples.values())
            exported = torch.export.export(segment.graph, examples, strict=False)
            exported._example_inputs = None
            torch.export.save(exported, self.folder / EXIT_GRAPH)
            found["exit_graph"] = EXIT_GRAPH
        code = self.folder / CODE
        found["compiled"] = {p.name: p.stat().st_size for p in sorted(code.glob("*.so"))}
        return found


def _checked(loaded: LoadedModel, target: Path, rows: Sequence[int]) -> tuple[int, ...]:
    if isinstance(loaded.model, EarlyExitModel):
        raise InputError(f"{loaded.name} is transformed already: give the original model")
    sizes = tuple(sorted(set(rows)))
    if not sizes or sizes[0] != 1 or sizes[-1] > MOST_ROWS:
        raise InputError(f"rows={list(rows)}: expected 1 and others up to {MOST_ROWS}")
    refuse_other_folder(target, is_transformed)
    return sizes
