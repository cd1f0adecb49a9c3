"""The wide twin: a small model's exact function at the size of a large one.

Every channel, head and key-value head is there ``factor`` times over: a hidden state of the twin is
the small one, tiled. What follows for each tensor:

    embedding [V, H]          tiled along its channels
    matrix [O, I]             W / factor, tiled both ways: each copy of an input gives its share
    bias, norm [O]            tiled; of one head's width: as it is
    tied embeddings           the head reads ``factor`` copies, so the final norm is divided instead
    translator of rank r      A / factor tiled along I, B / √factor tiled along O (‖h‖ grows by it)
    draft head                as a layer; its last norm stands where the final norm does

Factors that are powers of two divide exactly, so logits differ by the order of sums alone (B of a
translator rounds once more). Predictors read logits, so they fit as they are: exits of the twin are
the small model's, at the cost of a large one's layers.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from eepass.checkpoints.artifact import Artifact, fingerprint
from eepass.errors import InputError
from eepass.runtime.drafting.eagle_form import HeadForm
from eepass.runtime.drafting.eagle_layer import MATRICES

# of a draft head trained here
NORMS = HeadForm(features=3).norms
# families whose modules are linear layers, embeddings and norms over whole hidden states or heads
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
WIDENED = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")


def widen_model(
    model: Any, factor: int, device: torch.device | str, dtype: torch.dtype | None = None
) -> Any:
    """The twin of ``model``, in eval mode on ``device``; ``dtype``: the model's own if not given.

    Made tensor by tensor on the device: nothing larger than the small model's tensors is held
    besides it. Raises ``InputError`` for a family it does not know, or a factor that is no power of
    two.
    """
    config = model.config
    if factor < 1 or factor & (factor - 1):
        raise InputError(f"factor {factor}: must be a power of two, so that dividing is exact")
    if config.model_type not in FAMILIES:
        raise InputError(f"{config.model_type}: a twin is made of {', '.join(FAMILIES)} alone")
    wide_config = copy.deepcopy(config)
    wide_config.head_dim = _head_width(config)
    for name in WIDENED:
        setattr(wide_config, name, getattr(config, name) * factor)
    dtype = dtype or next(model.parameters()).dtype
    wide_config.dtype = dtype
    with torch.device("meta"):
        wide = type(model)(wide_config)
    norm = _final_norm(model) if _tied(model) else None
    made: dict[int, nn.Parameter] = {}
    for name, small in model.named_parameters(remove_duplicate=False):
        owner_name, _, attribute = name.rpartition(".")
        owner = wide.get_submodule(owner_name)
        if id(small) not in made:
            shape = getattr(owner, attribute).shape
            scale = _scale(owner, small, shape, factor)
            if norm is not None and small is norm.weight:
                scale /= factor
            tensor = widened(small.detach().to(device, dtype), shape, scale)
            made[id(small)] = nn.Parameter(tensor, requires_grad=False)
        setattr(owner, attribute, made[id(small)])
    _take_what_has_no_parameters(wide, model, device)
    wide.generation_config = model.generation_config
    return wide.eval()


def widen_artifact(artifact: Artifact, small: Any, wide: Any) -> Artifact:
    """``artifact`` of ``small`` as the artefact of its twin ``wide``."""
    factor = wide.config.hidden_size // small.config.hidden_size
    # normed states of the twin are tiled and, where the head is the embedding, divided
    state = 1 / factor if _tied(small) else 1.0
    device = next(wide.parameters()).device
    tensors = {}
    for name, tensor in artifact.tensors.items():
        kind = name.split(".")[0]
        tensor = tensor.to(device)
        if kind == "translator":
            tensor = _translator(name.rsplit(".", 1)[1], tensor, factor)
        elif kind == "eagle":
            hidden = small.config.hidden_size
            tensor = _draft_head(name.removeprefix("eagle."), tensor, hidden, factor, state)
        tensors[name] = tensor
    return Artifact(fingerprint(wide), artifact.presets, tensors, artifact.report)


def cut_model(model: Any, layers: int) -> Any:
    """The first ``layers`` layers of ``model`` with its head, over the same weights."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    with torch.device("meta"):
        short = type(model)(config)
    names = [name for name, _ in short.named_parameters(remove_duplicate=False)]
    for name in names:
        owner_name, _, attribute = name.rpartition(".")
        tensor = getattr(model.get_submodule(owner_name), attribute)
        setattr(short.get_submodule(owner_name), attribute, tensor)
    _take_what_has_no_parameters(short, model, next(model.parameters()).device)
    short.generation_config = model.generation_config
    return short.eval()


def widened(small: Tensor, shape: torch.Size | tuple[int, ...], scale: float) -> Tensor:
    """``small`` times ``scale``, repeated in each dimension up to ``shape``, in one allocation."""
    wide = small.new_empty(shape)
    folded, spread = [], []
    for size, own in zip(shape, small.shape, strict=True):
        folded += [size // own, own]
        spread += [1, own]
    # copies are written from the small tensor, broadcast
    wide.view(folded).copy_((small * scale).reshape(spread).expand(folded))
    return wide


def _scale(owner: Any, small: Tensor, shape: torch.Size, factor: int) -> float:
    """What a tensor is divided by: a matrix by the copies of its input."""
    if isinstance(owner, nn.Linear) and small.ndim == 2 and shape[1] != small.shape[1]:
        return 1 / factor
    return 1.0


def _translator(part: str, tensor: Tensor, factor: int) -> Tensor:
    if part == "down":
        rank, hidden = tensor.shape
        return widened(tensor, (rank, factor * hidden), 1 / factor)
    if part == "up":
        hidden, rank = tensor.shape
        # the root of the factor is no power of two: rounded when the model's dtype is known
        return widened(tensor.float(), (factor * hidden, rank), factor**-0.5)
    return widened(tensor, (factor * tensor.shape[0],), 1.0)


def _draft_head(part: str, tensor: Tensor, hidden: int, factor: int, state: float) -> Tensor:
    if part in ("features", "hot.ids", "rotary"):
        return tensor
    if part not in (*MATRICES, *NORMS):
        raise InputError(f"eagle.{part}: no tensor of a draft head that a twin knows")
    if part == "fc_norm":
        # a block of channels for each feature, of which the first, z, is not normed
        blocks = widened(tensor.view(-1, hidden), (len(tensor) // hidden, factor * hidden), 1.0)
        blocks[0] /= state
        return blocks.flatten()
    if part in NORMS:
        # the state meets the head's rows, as the final norm's does
        return widened(tensor, (factor * len(tensor),), state if part == "norm" else 1.0)
    if part in ("fc", "q", "k", "v"):
        # a block of channels for each feature, or for token and feature
        out, blocks = tensor.shape[0], tensor.shape[1] // hidden
        apart = tensor.view(out, blocks, hidden)
        wide = widened(apart, (factor * out, blocks, factor * hidden), 1 / factor)
        return wide.flatten(1)
    return widened(tensor, (factor * tensor.shape[0], factor * tensor.shape[1]), 1 / factor)


def _take_what_has_no_parameters(wide: Any, small: Any, device: torch.device | str) -> None:
    """Rotary tables and the like depend on a head's width, which is the same."""
    for name, module in small.named_modules():
        parent, _, attribute = name.rpartition(".")
        if attribute and list(module.buffers()) and not list(module.parameters()):
            own = copy.deepcopy(module).to(device)
            setattr(wide.get_submodule(parent), attribute, own)
    left = [n for n, t in [*wide.named_parameters(), *wide.named_buffers()] if t.is_meta]
    if left:
        raise InputError(f"{type(small).__name__}: a twin cannot be made of {', '.join(left)}")


def _tied(model: Any) -> bool:
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def _final_norm(model: Any) -> Any:
    return model.base_model.norm


def _head_width(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
