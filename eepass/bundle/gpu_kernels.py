"""``eepass codegen``: a model's GPU kernels, specialised and compiled where there is no GPU."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from eepass.checkpoints.artifact import Artifact
from eepass.checkpoints.fitting_artifact import artifact_for
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

# shapes of the exits where there is no artefact: what eepass train makes by default
UNTRAINED = {
    "drafts": 4, "width": 512, "rank": 128, "hot": 0, "predictor": torch.float32
}  # fmt: skip
# layers that an exit skips, assumed where there is no artefact
SKIPPED = 8
MOST_ROWS = 32
# the folder of kernels, by target, in a transformed folder
HOME = "kernels"


def capability_of(target: str, option: str = "--target") -> int:
    """90 of "sm_90"; ``InputError`` for an unknown target."""
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
    """The resources each kernel of ``model`` uses on ``target``: {"kernels": {name: {registers,
    spills, shared_bytes, bytes, predicted_us}}, ...}.

    ``out``: a folder for the machine code, one ``.cubin`` per specialisation, and
    ``kernels.json``. Raises ``InputError`` with the reason where no kernel is generated for the
    model's LM head.
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
    return compile_split(split, trained, target, (rows,), out)


def compile_split(
    split: SplitDecoder, artifact: Artifact | None, target: str, rows: Sequence[int],
    out: Path | None,
) -> dict[str, Any]:  # fmt: skip
    """As ``compile_kernels``, for a decoder that is split (for one row) and passes of each of
    ``rows``; where there are several the report names each kernel with its rows."""
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
    """The kernels in ``folder`` for this machine's GPU (or for ``capability``: 90), as
    ``codegen.kernels.register.register_kernels`` takes them: nothing is compiled on first use.

    ``folder``: what ``eepass codegen --out`` or ``eepass transform --gpu`` wrote. Raises
    ``InputError`` for kernels of another GPU or another eepass, and for damaged ones.
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
    """The LM head's form, all sizes, and by operator why no kernel is generated."""
    from eepass.codegen.kernels.catalogue import Sizes

    try:
        chain = read_head_chain(split.head)
    except PassError as error:
        raise InputError(f"no kernels for this model: {error}") from error
    lm_head = split.tensors[chain.lm_head]
    if artifact is not None and not artifact.presets:
        artifact = None
    shape = UNTRAINED if artifact is None else _trained(artifact)
    exits = [] if artifact is None else artifact.exits("default")
    kv, reason = _kv(split, min(exits, default=max(len(split.layers) - SKIPPED, 0)))
    sizes = Sizes(
        rows=rows, hidden=split.hidden_size, vocabulary=lm_head.shape[0], dtype=lm_head.dtype,
        kv=kv, **shape,
    )  # fmt: skip
    return chain, sizes, {"fill_kv": reason} if reason else {}


def _trained(artifact: Artifact) -> dict[str, Any]:
    """The shapes of an artefact's exits."""
    tensors = artifact.tensors
    ranks = [t.shape[0] for name, t in tensors.items() if re.match(r"translator\..*\.down$", name)]
    w1 = tensors[f"predictor.default.{artifact.exits('default')[0]}.w1"]
    return {
        "drafts": w1.shape[1] // 3, "width": w1.shape[0], "predictor": w1.dtype,
        "rank": max(ranks, default=0), "hot": len(tensors["hot.ids"]),
    }  # fmt: skip


def _kv(split: SplitDecoder, first_exit: int) -> tuple[KvSizes | None, str]:
    """The sizes of ``fill_kv`` for the exit that skips the most layers, or why it is not made."""
    from eepass.codegen.kernels.catalogue import KvSizes

    fill = split.kv_fills[-1]
    try:
        form = read_kv_fill(fill, split.tensors)
    except PassError as error:
        return None, str(error)
    keys, values = (
        split.tensors[name].shape[1 if form.transposed else 0]
        for name in (form.key_weight, form.value_weight)
    )
    layers = max(len(split.layers) - first_exit, 1)
    dtypes = {role.name: value.dtype for role, value in fill.examples.items()}
    rotary = dtypes.get(form.cos, torch.float32)
    return KvSizes(layers, split.cache_length, form, keys, values, rotary), ""


def _refuse_without_triton() -> None:
    if importlib.util.find_spec("triton") is None:
        raise InputError("kernels are generated with triton: pip install 'eepass[gpu]'")
