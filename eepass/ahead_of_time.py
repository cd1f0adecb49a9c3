"""``eepass codegen``: a model's GPU kernels, specialised and compiled where there is no GPU."""

from __future__ import annotations

import importlib.util
import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from eepass.artifact import Artifact, load_artifact, refuse_other_model
from eepass.errors import InputError
from eepass.passes.pipeline import split_decoder
from eepass.passes.read_head_chain import read_head_chain
from eepass.passes.read_kv_fill import read_kv_fill
from eepass.passes.report import PassError
from eepass.plan import HeadChain, SplitDecoder

if TYPE_CHECKING:
    from eepass.codegen.kernels.catalogue import KvSizes, Sizes

# of the exits of a model that has no artefact yet: what eepass train makes by default
UNTRAINED = {"drafts": 4, "width": 512, "rank": 128, "hot": 0}
# layers an early exit of an untrained model is taken to skip
SKIPPED = 8
MOST_ROWS = 32


def capability_of(target: str) -> int:
    """90 of "sm_90"; ``InputError`` for a target nothing is known of."""
    _refuse_without_triton()
    from eepass.codegen.kernels.catalogue import BANDWIDTH

    found = re.fullmatch(r"sm_(\d+)", target)
    if found is None or int(found[1]) not in BANDWIDTH:
        known = ", ".join(f"sm_{number}" for number in BANDWIDTH)
        raise InputError(f"--target {target}: known are {known}")
    return int(found[1])


def compile_kernels(
    model: Any, artifact: Path | None, target: str, rows: int = 1, out: Path | None = None
) -> dict[str, Any]:
    """What each kernel of ``model`` needs on ``target``: {"kernels": {name: {registers, spills,
    shared_bytes, bytes, predicted_us}}, ...}.

    ``out``: a folder for the machine code, one ``.cubin`` a specialisation, and ``kernels.json``.
    Raises ``InputError`` where the head is one no kernel is generated for, with the reason.
    """
    capability = capability_of(target)
    if not 0 < rows <= MOST_ROWS:
        raise InputError(f"--rows {rows}: kernels take 1 to {MOST_ROWS}")
    from eepass.codegen.kernels.catalogue import kernels, predicted_us
    from eepass.codegen.kernels.compile import compile_launch, key_of

    if artifact is not None:
        trained = load_artifact(artifact)
        refuse_other_model(trained, model, "artifact")
    else:
        trained = None
    chain, sizes, refused = _specialisation(model, trained, rows)
    made: dict[str, Any] = {}
    report: dict[str, dict[str, float]] = {}
    for name, launch in kernels(chain, sizes).items():
        key = key_of(launch, capability)
        if key not in made:
            made[key] = compile_launch(launch, capability)
        cubin = made[key]
        report[name] = {
            "registers": cubin.registers,
            "spills": cubin.spills,
            "shared_bytes": cubin.shared_bytes,
            "bytes": launch.bytes,
            "predicted_us": round(predicted_us(launch, capability), 2),
        }
        if out is not None:
            _keep(out, cubin)
    result = {
        "target": target, "rows": rows, "head": asdict(chain), "kernels": report,
        "not_generated": refused,
    }  # fmt: skip
    if out is not None:
        entries = {
            c.key: {"entry": c.name, "warps": c.warps, "shared_bytes": c.shared_bytes}
            for c in made.values()
        }
        text = json.dumps({**result, "cubins": entries}, indent=1) + "\n"
        (out / "kernels.json").write_text(text, encoding="utf-8")
    return result


def _specialisation(
    model: Any, artifact: Artifact | None, rows: int
) -> tuple[HeadChain, Sizes, dict[str, str]]:
    """The head's form, all sizes, and by operator why it is not generated."""
    from eepass.codegen.kernels.catalogue import Sizes

    try:
        with torch.no_grad():
            split, _ = split_decoder(model, 1, 64)
        chain = read_head_chain(split.head)
    except PassError as error:
        raise InputError(f"{type(model).__name__}: no kernels for it: {error}") from error
    lm_head = split.tensors[chain.lm_head]
    shape = UNTRAINED if artifact is None else _trained(artifact)
    exits = [] if artifact is None else _exits(artifact)
    kv, reason = _kv(split, min(exits, default=max(len(split.layers) - SKIPPED, 0)))
    sizes = Sizes(
        rows=rows, hidden=split.hidden_size, vocabulary=lm_head.shape[0], dtype=lm_head.dtype,
        kv=kv, **shape,
    )  # fmt: skip
    return chain, sizes, {"fill_kv": reason} if reason else {}


def _exits(artifact: Artifact) -> list[int]:
    found = (re.match(r"predictor\.default\.(\d+)\.w1$", name) for name in artifact.tensors)
    return [int(match[1]) for match in found if match]


def _trained(artifact: Artifact) -> dict[str, int]:
    tensors = artifact.tensors
    ranks = [t.shape[0] for name, t in tensors.items() if re.match(r"translator\..*\.down$", name)]
    layers = [t for name, t in tensors.items() if re.match(r"predictor\.default\..*\.w1$", name)]
    return {
        "drafts": layers[0].shape[1] // 3,
        "width": layers[0].shape[0],
        "rank": max(ranks, default=0),
        "hot": len(tensors["hot.ids"]),
    }


def _kv(split: SplitDecoder, first_exit: int) -> tuple[KvSizes | None, str]:
    """What ``fill_kv`` is specialised for where the most layers are skipped, or why it is not."""
    from eepass.codegen.kernels.catalogue import KvSizes

    try:
        form = read_kv_fill(split.kv_fills[-1])
    except PassError as error:
        return None, str(error)
    return KvSizes(
        layers=max(len(split.layers) - first_exit, 1), groups=form.groups, channels=form.channels,
        rotary=form.rotary, slots=split.cache_length, norm=form.norm, eps=form.eps,
        weight_offset=form.weight_offset, norm_bias=bool(form.norm_bias),
        bias=bool(form.key_bias), head_norm=bool(form.head_norm),
    ), ""  # fmt: skip


def _keep(folder: Path, cubin: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{cubin.key}.cubin").write_bytes(cubin.code)


def _refuse_without_triton() -> None:
    if importlib.util.find_spec("triton") is None:
        raise InputError("kernels are generated with triton: pip install 'eepass[gpu]'")
