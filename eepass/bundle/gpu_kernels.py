"""``eepass codegen``: a model's GPU kernels, specialised and compiled where there is no GPU."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from eepass.checkpoints.artifact import Artifact, load_artifact, refuse_other_model
from eepass.codegen.cuda.stored_kernels import KernelsUnfit, best_folder, write_kernels
from eepass.errors import InputError, PassError
from eepass.kernel_forms import HeadChain
from eepass.passes.exits.read_head_chain import read_head_chain
from eepass.passes.exits.read_kv_fill import read_kv_fill
from eepass.passes.pipeline import split_decoder
from eepass.segments import SplitDecoder

if TYPE_CHECKING:
    from eepass.codegen.kernels.catalogue import KvSizes, Sizes
    from eepass.codegen.kernels.cubins import Cubins

# of the exits of a model that has no artefact yet: what eepass train makes by default
UNTRAINED = {
    "drafts": 4, "width": 512, "rank": 128, "hot": 0, "predictor": torch.float32
}  # fmt: skip
# layers an early exit of an untrained model is taken to skip
SKIPPED = 8
MOST_ROWS = 32
# where a transformed folder keeps kernels, by target
HOME = "kernels"


def capability_of(target: str, option: str = "--target") -> int:
    """90 of "sm_90"; ``InputError`` for a target nothing is known of."""
    _refuse_without_triton()
    from eepass.codegen.kernels.catalogue import BANDWIDTH

    found = re.fullmatch(r"sm_(\d+)", target)
    if found is None or int(found[1]) not in BANDWIDTH:
        known = ", ".join(f"sm_{number}" for number in BANDWIDTH)
        raise InputError(f"{option} {target}: known are {known}")
    return int(found[1])


def compile_kernels(
    model: Any, artifact: Path | None, target: str, rows: int = 1, out: Path | None = None
) -> dict[str, Any]:
    """What each kernel of ``model`` needs on ``target``: {"kernels": {name: {registers, spills,
    shared_bytes, bytes, predicted_us}}, ...}.

    ``out``: a folder for the machine code, one ``.cubin`` a specialisation, and ``kernels.json``.
    Raises ``InputError`` where the head is one no kernel is generated for, with the reason.
    """
    capability_of(target)
    if not 0 < rows <= MOST_ROWS:
        raise InputError(f"--rows {rows}: kernels take 1 to {MOST_ROWS}")
    trained = None if artifact is None else load_artifact(artifact)
    if trained is not None:
        refuse_other_model(trained, model, "artifact")
    try:
        with torch.no_grad():
            split, _ = split_decoder(model, 1, 64)
    except PassError as error:
        raise InputError(f"{type(model).__name__}: no kernels for it: {error}") from error
    return compile_split(split, trained, target, (rows,), out)


def compile_split(
    split: SplitDecoder,
    artifact: Artifact | None,
    target: str,
    rows: Sequence[int],
    out: Path | None,
) -> dict[str, Any]:
    """As ``compile_kernels``, of a decoder that is split (for one row), for passes of each of
    ``rows``; the report names kernels by operator, with their rows where there are several."""
    capability = capability_of(target)
    from eepass.codegen.kernels.catalogue import kernels, predicted_us
    from eepass.codegen.kernels.compile import compile_launch
    from eepass.codegen.kernels.cubins import sources
    from eepass.codegen.kernels.specialise import key_of

    made: dict[str, Any] = {}
    report: dict[str, dict[str, float]] = {}
    for count in rows:
        chain, sizes, refused = _specialisation(split, artifact, count)
        for name, launch in kernels(chain, sizes).items():
            key = key_of(launch, capability)
            if key not in made:
                made[key] = compile_launch(launch, capability)
            cubin = made[key]
            report[name if len(rows) == 1 else f"{name} x{count}"] = {
                "registers": cubin.registers,
                "spills": cubin.spills,
                "shared_bytes": cubin.shared_bytes,
                "bytes": launch.bytes,
                "predicted_us": round(predicted_us(launch, capability), 2),
            }
    result = {
        "target": target, "rows": rows[0] if len(rows) == 1 else list(rows),
        "head": asdict(chain), "kernels": report, "not_generated": refused,
    }  # fmt: skip
    if out is not None:
        write_kernels(out, capability, made.values(), sources(), result)
    return result


def ready_kernels(folder: str | Path, capability: int | None = None) -> Cubins:
    """The kernels in ``folder`` for the GPU that is here (or ``capability``: 90), to be given to
    ``codegen.kernels.register.register_kernels``: nothing is compiled when they first run.

    ``folder``: what ``eepass codegen --out`` or ``eepass transform --gpu`` wrote. Raises
    ``InputError`` for another GPU's, for those of another eepass, for damaged ones.
    """
    _refuse_without_triton()
    from eepass.codegen.kernels.cubins import Cubins

    home = Path(folder)
    if capability is None:
        if not torch.cuda.is_available():
            raise InputError(f"{home}: its kernels are for a GPU, and none is here")
        major, minor = torch.cuda.get_device_capability()
        capability = 10 * major + minor
    try:
        inside = home / HOME
        return Cubins(best_folder(inside, capability) if inside.is_dir() else home, capability)
    except KernelsUnfit as error:
        raise InputError(str(error)) from error


def _specialisation(
    split: SplitDecoder, artifact: Artifact | None, rows: int
) -> tuple[HeadChain, Sizes, dict[str, str]]:
    """The head's form, all sizes, and by operator why it is not generated."""
    from eepass.codegen.kernels.catalogue import Sizes

    try:
        chain = read_head_chain(split.head)
    except PassError as error:
        raise InputError(f"no kernels for this model: {error}") from error
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


def _trained(artifact: Artifact) -> dict[str, Any]:
    tensors = artifact.tensors
    ranks = [t.shape[0] for name, t in tensors.items() if re.match(r"translator\..*\.down$", name)]
    layers = [t for name, t in tensors.items() if re.match(r"predictor\.default\..*\.w1$", name)]
    return {
        "drafts": layers[0].shape[1] // 3,
        "width": layers[0].shape[0],
        "predictor": layers[0].dtype,
        "rank": max(ranks, default=0),
        "hot": len(tensors["hot.ids"]),
    }


def _kv(split: SplitDecoder, first_exit: int) -> tuple[KvSizes | None, str]:
    """What ``fill_kv`` is specialised for where the most layers are skipped, or why it is not."""
    from eepass.codegen.kernels.catalogue import KvSizes

    try:
        form = read_kv_fill(split.kv_fills[-1], split.tensors)
    except PassError as error:
        return None, str(error)
    keys, values = (
        split.tensors[name].shape[1 if form.transposed else 0]
        for name in (form.key_weight, form.value_weight)
    )
    layers, fill = max(len(split.layers) - first_exit, 1), split.kv_fills[-1]
    placeholders = fill.graph.graph.find_nodes(op="placeholder")
    dtypes = {r.name: n.meta["val"].dtype for n, r in zip(placeholders, fill.inputs, strict=True)}
    turns = dtypes.get(form.cos, torch.float32)
    return KvSizes(layers, split.cache_length, form, keys, values, turns), ""


def _refuse_without_triton() -> None:
    if importlib.util.find_spec("triton") is None:
        raise InputError("kernels are generated with triton: pip install 'eepass[gpu]'")
