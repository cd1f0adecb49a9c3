"""Write a trained draft head as a checkpoint that other servers draft with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eepass.checkpoints.artifact import Artifact, without_prefix
from eepass.checkpoints.fitting_artifact import artifact_for
from eepass.checkpoints.models import LoadedModel, original_of
from eepass.drafts.head_config import HeadConfig
from eepass.drafts.head_tensors import in_speculators_form, to_checkpoint
from eepass.drafts.read_head import CONFIG, Target
from eepass.drafts.readme import readme
from eepass.drafts.rope import rope_of
from eepass.drafts.target import target_of
from eepass.errors import InputError
from eepass.files import save_tensors, writing
from eepass.folders import refuse_other_folder, replacing_folder
from eepass.model import split_model
from eepass.reading import is_whole_number, parse_json
from eepass.runtime.drafting.eagle_form import HeadForm, form_of

FORMATS = ("eagle3", "speculators", "gguf")
# tokens of a model that is only looked at
ROOM = 64
WEIGHTS, README = "model.safetensors", "README.md"


def export_draft(
    loaded: LoadedModel,
    artifact: str | Path | Artifact,
    out: str | Path,
    format: str = "eagle3",
    verifier: str | None = None,
) -> dict[str, Any]:
    """Write the draft head of ``artifact``, trained for ``loaded``, to the folder ``out``, whole or
    not at all; returns what was written.

    ``format``: "eagle3", as vLLM reads it, or "speculators", the form of vLLM's library.
    ``verifier``: what the server calls the model, as ``loaded`` is called unless given. An
    exported folder is replaced. Nothing is rounded. Raises ``InputError`` for another folder, an
    artefact without a head, and a head that the format cannot hold, with the reason.
    """
    if format not in FORMATS:
        raise InputError(f"format {format!r}: expected {', '.join(FORMATS)}")
    model = original_of(loaded, "export from the original one")
    target = Path(out).resolve()
    refuse_other_folder(target, is_exported)
    found = artifact_for(model, artifact)
    if "eagle.fc" not in found.tensors:
        raise InputError("the artefact has no draft head: run eepass train --draft eagle")
    head = without_prefix(found.tensors, "eagle.")
    if format == "gguf":
        raise InputError(_no_gguf(form_of(head)))
    name = verifier or loaded.name
    if name == "smollm2" or name.endswith(".gguf"):
        raise InputError(f"give --verifier: the folder or id of {name} as the server reads it")
    splits, _ = split_model(model, ROOM, (1,))
    trained_for = target_of(model, splits[1])
    head.setdefault("hot.ids", found.tensors.get("hot.ids", torch.zeros(0)))
    head.setdefault("hot.head", trained_for.lm_head[head["hot.ids"].long()])
    tensors, config = _checkpoint(head, model, trained_for, found)
    values, steps = config.flat(_dtype(tensors)), _steps(found)
    if format == "speculators":
        architectures = [type(model).__name__]
        values = config.speculators(_dtype(tensors), name, architectures, steps)
        tensors = in_speculators_form(tensors)
    text = readme(name, format, config, found.report, steps)
    with writing(target), replacing_folder(target, is_exported) as folder:
        save_tensors(folder / WEIGHTS, tensors, {"format": "pt"})
        (folder / CONFIG).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        (folder / README).write_text(text, encoding="utf-8")
        size = (folder / WEIGHTS).stat().st_size
    return {
        "format": format, "out": str(target), "bytes": size, "layers": list(config.layers),
        "draft_vocabulary": config.draft_vocabulary, "steps": steps,
    }  # fmt: skip


def is_exported(folder: Path) -> bool:
    """Whether ``folder`` holds an exported head, and nothing else."""
    if {path.name for path in folder.iterdir()} - {CONFIG, WEIGHTS, README}:
        return False
    try:
        values = parse_json((folder / CONFIG).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and "draft_vocab_size" in values


def _checkpoint(
    head: Mapping[str, Tensor], model: Any, target: Target, artifact: Artifact
) -> tuple[dict[str, Tensor], HeadConfig]:
    form = form_of(head)
    if form.reads_z and target.final_norm is None:
        raise InputError(
            f"{type(model).__name__}: its final norm is no RMS norm times one weight, and a head "
            "that reads normed states cannot be written without it"
        )
    tensors, layers = to_checkpoint(head, target.final_norm, target.depth, target.vocabulary)
    width = 2 * len(head["rotary"])
    known = model.config.get_text_config(decoder=True)
    # where it was imported
    said = _draft_report(artifact).get("config")
    return tensors, HeadConfig(
        hidden=len(head["norm"]),
        target_hidden=target.hidden,
        inner=len(head["gate"]),
        heads=len(head["q"]) // width,
        groups=len(head["k"]) // width,
        head_width=width,
        vocabulary=target.vocabulary,
        draft_vocabulary=len(head["hot.ids"]),
        positions=int(getattr(known, "max_position_embeddings", 0) or 2048),
        layers=layers,
        rope=rope_of(head["rotary"], said.get("rope") if isinstance(said, Mapping) else None),
        epsilon=form.epsilon,
        norm_before_residual=form.norm_before_residual,
        norm_output=form.norm_output,
        norm_before_fc=form.fc_norm == "together",
        fc_norm=form.fc_norm == "each",
        window=form.window,
    )


def _dtype(tensors: Mapping[str, Tensor]) -> str:
    return str(tensors["midlayer.self_attn.q_proj.weight"].dtype).removeprefix("torch.")


def _steps(artifact: Artifact) -> int:
    """Draft tokens in a row that the head was trained for."""
    steps: Any = _draft_report(artifact).get("steps")
    return int(steps) if is_whole_number(steps) and steps > 0 else 3


def _draft_report(artifact: Artifact) -> Mapping[str, Any]:
    report = artifact.report.get("draft_head")
    return report if isinstance(report, Mapping) else {}


def _no_gguf(form: HeadForm) -> str:
    missing = [
        name
        for name, there in (("fc_norm", form.fc_norm != "none"), ("norm_output", form.norm_output))
        if there
    ]
    if missing:
        return (
            f"format gguf: this head has {' and '.join(missing)}, and llama.cpp's graph of EAGLE-3 "
            "has neither; vLLM drafts with it (--format eagle3)"
        )
    return (
        "format gguf: llama.cpp writes it itself; export --format eagle3 and run "
        "convert_hf_to_gguf.py on that with --target-model-dir"
    )
