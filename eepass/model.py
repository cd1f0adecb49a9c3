"""``eepass.transform``: a decoder in, the same decoder that exits early out."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn

from eepass.checkpoints.artifact import Artifact
from eepass.checkpoints.fitting_artifact import artifact_for
from eepass.checkpoints.quantized_weights import quantization_of, weights_to_read
from eepass.checkpoints.read_torchao import read_quantized
from eepass.codegen.cpu.building import build_kernels
from eepass.codegen.cpu.native import load_kernels
from eepass.codegen.loops import read_headers
from eepass.config import ExitConfig
from eepass.draft_models import draft_from, refuse_other_drafts
from eepass.early_exit_model import ARTIFACT, EarlyExitModel, making_tensors_on
from eepass.errors import EngineError, InputError, PassError
from eepass.executors import ALWAYS_ACTIVE
from eepass.kept.splits import kept_splits
from eepass.lengths import refuse_longer, usual_length
from eepass.passes.report import PassReport
from eepass.runtime.step.launching import choose, require_device, require_room, running_out
from eepass.segments import SplitDecoder
from eepass.wrappers import adapted_inside, no_model

__all__ = [
    "ALWAYS_ACTIVE", "ARTIFACT", "MAX_LENGTH", "PREFILL_ROWS", "STEP_ROWS", "EarlyExitModel",
    "split_model", "transform",
]  # fmt: skip
PREFILL_ROWS = 64
MAX_LENGTH = 1024
# on a CPU two rows cost what four do, three more what eight do, and each count is compiled
STEP_ROWS = (1, 4, 8, 16)
CUDA_ROWS = (1, 2, 4, 8, 16, 32)
# of chunks of prompts there: a pass of 256 rows still waits for weights, one of 1024 computes
CHUNK_ROWS, WIDE_ROWS = 256, 1024
# slots come in multiples of 64; cuDNN's attention under a mask reads keys in tiles of 128, and has
# taken the empty half of a tile for keys (PyTorch issue 196678)
SLOTS_STEP = {"cuda": 128}


def transform(
    model: Any,
    artifact: str | Path | Artifact | None = None,
    config: ExitConfig | None = None,
    max_length: int | None = None,
    stop: frozenset[int] = frozenset(),
    dump: Path | None = None,
    draft_model: Any = None,
    *,
    device: str | torch.device | None = None,
    launch: str | None = None,
    debug: bool = False,
) -> EarlyExitModel:
    """Transform a Hugging Face causal LM (fp32 or bf16, on a GPU fp16 too; eval mode).

    Traces, splits and lays out the weights; compiling waits for the first token. Layers that
    torchao quantised are replaced in ``model`` by equivalent ones that can be compiled; exact then
    means the answer of the quantised model.

    Of a model that ``torch.compile`` or PEFT wraps it takes the one inside, its adapter included.
    A model that is transformed already is configured anew over the same code, weights and cache;
    it has its own artefact or none.
    ``artifact``: a folder written by ``eepass.train``; without one no token exits early, and
    draft tokens come from the prompt. ``config``: ``ExitConfig()``, exact, unless given, on every
    device. ``max_length``: prompt and answer together, 1024 if not given, and no more than the
    model knows positions for. ``stop``: end tokens. ``dump``: folder for the graph before and
    after each pass. ``draft_model``, for ``speculate="model"``: a small transformed model of
    the same vocabulary, or what the checkpoint brings: an ``MtpModel`` or a DFlash assistant.
    ``device`` "cuda" moves the model there. With ``device`` or ``launch``, approximate early exit,
    dense decoding and drafts that are not weighed against their costs go by captured steps, the
    rest through the engine on the same device. ``launch``: "device" (one CUDA graph with IF nodes),
    "predicated" (one without), "host" (segment by segment), "calls" (launch by launch, nothing
    captured), "interpret" (on a CPU, every launch checked), "auto" (the best there is; a simpler
    one where that one cannot be captured).
    ``debug``: assert at each step that nothing has moved since it was captured.
    Raises ``InputError`` for a model, artefact or config that does not fit, with the reason;
    ``EngineError`` for a device or launch mode that is not to be had.
    """
    model = adapted_inside(model)
    captured = device is not None or launch is not None
    if captured and (dump is not None or draft_model is not None):
        raise InputError("dump and draft_model go with neither device= nor launch=")
    refuse_other_drafts(draft_model)
    if isinstance(model, EarlyExitModel):
        if captured:
            raise InputError("device= and launch= want the original model, not a transformed one")
        if dump is not None:
            raise InputError(f"the passes are done in {model.folder}: give the original model")
        made = _sharing(model, artifact, max_length)
        made.draft = draft_from(draft_model, made.decoder, None)
        made.record(config)
        return made
    if not isinstance(model, nn.Module):
        raise no_model(model)
    if model.training:
        raise InputError("the model is in training mode: call model.eval() first")
    launching = compiler = None
    if captured:
        target = _device(device or "cpu", model)
        launching = choose(launch or "auto", target)
        compiler = _cuda_compiler() if target.type == "cuda" else None
    read_quantized(model)
    loaded = None if artifact is None else artifact_for(model, artifact)
    with running_out("moving the model and tracing it"):
        if captured:
            _move(model, target, max_length)
        rows = CUDA_ROWS if compiler is not None else STEP_ROWS
        with making_tensors_on(next(model.parameters()).device):
            splits, report, key = _splits(model, max_length, rows, dump)
            if captured and splits[1].stepwise:
                raise InputError(
                    f"{type(model).__name__} has recurrent layers: leave device= and launch= out"
                )
            made = EarlyExitModel(
                splits, report, stop, loaded, compiler,
                launching=launching, debug=debug, kept=key,
            )  # fmt: skip
    made.draft = draft_from(draft_model, made.decoder, model)
    made.record(config)
    return made


def split_model(
    model: Any, max_length: int | None, rows: Sequence[int], dump: Path | None = None
) -> tuple[dict[int, SplitDecoder], PassReport]:
    """``model`` split for passes of ``rows`` and for prompts, its weights laid out to be read."""
    from eepass.checkpoints.weight_memory import settle_weights
    from eepass.passes.pipeline import split_for_rows

    slots, prefill = _slots(model, max_length), _prefill_rows(model)
    wide = (WIDE_ROWS,) if prefill == CHUNK_ROWS and slots > WIDE_ROWS else ()
    settle_weights(weights_to_read(model))
    if quantization_of(model):
        # checks run the model, and without its kernels each layer would be dequantised each time
        load_kernels()
    with torch.no_grad(), ThreadPoolExecutor(1) as beside:
        # needed next; where they are still to be built, that takes as long as tracing
        beside.submit(build_kernels)
        beside.submit(read_headers)
        try:
            return split_for_rows(model, slots, rows, prefill, dump, wide)
        except PassError as error:
            raise InputError(f"{type(model).__name__} cannot be transformed: {error}") from error


def _splits(
    model: Any, max_length: int | None, rows: Sequence[int], dump: Path | None
) -> tuple[dict[int, SplitDecoder], PassReport, str]:
    """As ``split_model``, or as an earlier process split it; and the key it is kept under, ""
    where it is not kept."""
    if dump is not None or next(model.parameters()).device.type != "cpu":
        return *split_model(model, max_length, rows, dump), ""
    from eepass.checkpoints.weight_memory import settle_weights

    slots = _slots(model, max_length)
    settle_weights(weights_to_read(model))
    options = (slots, tuple(rows), PREFILL_ROWS)
    return kept_splits(model, options, lambda: split_model(model, max_length, rows))


def _slots(model: Any, max_length: int | None) -> int:
    """Slots of the cache for texts of ``max_length``; ``InputError`` for one too long."""
    length = max_length or usual_length(model, MAX_LENGTH)
    refuse_longer(model, length, f"max_length={length}")
    step = SLOTS_STEP.get(next(model.parameters()).device.type, 64)
    # behind the last token there is room for the padding of a prompt
    return -(-(length + _prefill_rows(model)) // step) * step


def _prefill_rows(model: Any) -> int:
    """Rows of a chunk of a prompt, where ``model`` is; of the smallest on a GPU."""
    return CHUNK_ROWS if next(model.parameters()).device.type == "cuda" else PREFILL_ROWS


def _sharing(
    model: EarlyExitModel,
    artifact: str | Path | Artifact | None,
    max_length: int | None,
) -> EarlyExitModel:
    """Another model over the code of ``model``, with its artefact or none."""
    room = model.decoder.max_sequence_length
    if max_length is not None and max_length > room:
        raise InputError(
            f"max_length={max_length}: this was transformed for texts of {room} tokens; shorten "
            "the prompt, ask for fewer new tokens, or transform the original for longer ones"
        )
    own: Any = model.artifact
    if isinstance(artifact, (str, Path)):
        own = artifact if Path(artifact).resolve() == model.artifact_folder else None
    if artifact is not None and artifact is not own:
        raise InputError(
            f"{artifact}: a transformed model has its own artefact, compiled in; "
            "transform the original one with this artefact"
        )
    other = model.share(model.launching)
    if artifact is None:
        other.artifact = None
    return other


def _device(device: str | torch.device, model: Any) -> torch.device:
    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"device={str(device)!r}: must be cpu or cuda") from error
    require_device(target, next(model.parameters()).dtype)
    return target


def _move(model: Any, target: torch.device, max_length: int | None) -> None:
    """Move ``model``; ``EngineError`` beforehand where its weights and cache do not fit."""
    if target.type == "cuda":
        config = model.config.get_text_config(decoder=True)
        all_heads, weight = config.num_attention_heads, next(model.parameters())
        heads = getattr(config, "num_key_value_heads", None) or all_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // all_heads
        slots = (max_length or usual_length(model, MAX_LENGTH)) + CHUNK_ROWS
        slots += -slots % SLOTS_STEP["cuda"]
        # twice: a trace needs a cache of its own for a while
        needed = 2 * 2 * config.num_hidden_layers * heads * width * weight.itemsize * slots
        if weight.device.type != "cuda":
            needed += sum(p.nbytes for p in model.parameters())
        require_room(target, int(needed))
    model.to(target)


def _cuda_compiler() -> Any:
    from eepass.codegen.lower_cuda import CudaCompiler

    try:
        from eepass.codegen.kernels.register import register_kernels
    except ImportError as error:
        raise EngineError(f"{error}: pip install 'eepass[gpu]'") from error
    # logits and exit points are kernels
    register_kernels()
    return CudaCompiler()
