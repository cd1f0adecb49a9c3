"""``eepass codegen``: a model's GPU kernels, specialised and compiled where there is no GPU."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from eepass.checkpoints.artifact import Artifact
from eepass.checkpoints.fitting_artifact import artifact_for
from eepass.errors import InputError, PassError
from eepass.kernel_forms import HeadChain
from eepass.passes.exits.read_head_chain import read_head_chain
from eepass.passes.pipeline import split_decoder
from eepass.segments import SplitDecoder

if TYPE_CHECKING:
    from eepass.codegen.kernels.catalogue import Sizes

# shapes of the exits where there is no artefact: what eepass train makes by default
UNTRAINED = {
    "drafts": 4, "width": 512, "rank": 128, "hot": 0, "predictor": torch.float32
}  # fmt: skip
MOST_ROWS = 32


def capability_of(target: str) -> int:
    """90 of "sm_90"; ``InputError`` for an unknown target."""
    _refuse_without_triton()
    from eepass.codegen.kernels.catalogue import BANDWIDTH

    found = re.fullmatch(r"sm_(\d+)", target)
    if found is None or int(found[1]) not in BANDWIDTH:
        known = ", ".join(f"sm_{number}" for number in BANDWIDTH)
        raise InputError(f"--target {target}: known are {known}")
    return int(found[1])


def compile_kernels(
    model: Any, artifact: Path | None, target: str, rows: int = 1
) -> dict[str, Any]:
    """The resources each kernel of ``model`` uses on ``target``: {"kernels": {name: {registers,
    spills, shared_bytes, bytes, predicted_us}}, ...}. Raises ``InputError`` with the reason where
    no kernel is generated for the model's LM head.
    """
    capability_of(target)
    if not 0 < rows <= MOST_ROWS:
        raise InputError(f"--rows {rows}: kernels take 1 to {MOST_ROWS}")
    trained = None if artifact is None else artifact_for(model, artifact)
    try:
        with torch.no_grad():
            split, _ = split_decoder(model, 1, 64)
    except PassError as error:
        raise InputError(f"{type(model).__name__}: no kernels for it: {error}") from error
    return compile_split(split, trained, target, rows)


def compile_split(
    split: SplitDecoder, artifact: Artifact | None, target: str, rows: int
) -> dict[str, Any]:
    """As ``compile_kernels``, for a decoder that is split, for one row."""
    capability = capability_of(target)
    from eepass.codegen.kernels.catalogue import kernels, predicted_us
    from eepass.codegen.kernels.compile import compile_launch

    report: dict[str, dict[str, float]] = {}
    chain, sizes = _specialisation(split, artifact, rows)
    for name, launch in kernels(chain, sizes).items():
        made = compile_launch(launch, capability)
        report[name] = {
            **asdict(made), "bytes": launch.bytes,
            "predicted_us": round(predicted_us(launch, capability), 2),
        }  # fmt: skip
    return {"target": target, "rows": rows, "head": asdict(chain), "kernels": report}


def _specialisation(
    split: SplitDecoder, artifact: Artifact | None, rows: int
) -> tuple[HeadChain, Sizes]:
    """The LM head's form, and all sizes."""
    from eepass.codegen.kernels.catalogue import Sizes

    try:
        chain = read_head_chain(split.head)
    except PassError as error:
        raise InputError(f"no kernels for this model: {error}") from error
    lm_head = split.tensors[chain.lm_head]
    if artifact is not None and not artifact.presets:
        artifact = None
    shape = UNTRAINED if artifact is None else _trained(artifact)
    sizes = Sizes(
        rows=rows, hidden=split.hidden_size, vocabulary=lm_head.shape[0], dtype=lm_head.dtype,
        **shape,
    )  # fmt: skip
    return chain, sizes


def _trained(artifact: Artifact) -> dict[str, Any]:
    """The shapes of an artefact's exits."""
    tensors = artifact.tensors
    ranks = [t.shape[0] for name, t in tensors.items() if re.match(r"translator\..*\.down$", name)]
    w1 = tensors[f"predictor.default.{artifact.exits('default')[0]}.w1"]
    return {
        "drafts": w1.shape[1] // 3, "width": w1.shape[0], "predictor": w1.dtype,
        "rank": max(ranks, default=0), "hot": len(tensors["hot.ids"]),
    }  # fmt: skip


def _refuse_without_triton() -> None:
    if importlib.util.find_spec("triton") is None:
        raise InputError("kernels are generated with triton: pip install 'eepass[gpu]'")
