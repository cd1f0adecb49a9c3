"""``torch.compile(model, backend="specee", options={…})``: one decode step that may exit early.

A graph that decodes one token a sequence over a static cache becomes layers, with an artefact
predictors and exits as well; any other goes to the inner backend whole. What a call returns and
leaves in the cache is what the model returns and leaves, save that after an exit the logits are
computed from the hidden state at the exit, and the deeper layers' keys and values are projected
from it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from eepass.checkpoints.quantized_weights import weights_to_read
from eepass.checkpoints.weight_memory import settle_weights
from eepass.errors import PassError
from eepass.passes.caller.caller_graph import CallerGraph
from eepass.private_names import lookup_backend
from eepass.torch_compile.early_exit_step import EarlyExitStep
from eepass.torch_compile.model_lookup import (
    expressions_of,
    find_model,
    log,
    say_once,
)  # fmt: skip
from eepass.torch_compile.options import BackendOptions


def specee(
    graph: GraphModule,
    examples: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile one of Dynamo's graphs; see ``BackendOptions`` for the options.

    ``mode`` goes to inductor for what is compiled whole. Raises ``InputError`` for options and
    artefacts that do not fit.
    """
    wanted = BackendOptions.of(options or {})
    try:
        caller = CallerGraph(graph, examples)
        if torch.is_grad_enabled() and any(
            isinstance(tensor, Tensor) and tensor.requires_grad for tensor in examples
        ):
            raise PassError("gradients are wanted: call it under torch.no_grad()")
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            raise PassError("autocast is on")
    except PassError as error:
        log.debug("compiled whole: %s", error)
    else:
        try:
            model, expression = find_model(expressions_of(graph), caller.tensors_of(examples))
            _require_splittable(model)
            # weights may move: before exits keep their addresses
            with torch.no_grad():
                settle_weights(weights_to_read(model))
            return EarlyExitStep(caller, examples, model, expression, wanted)
        except PassError as error:
            say_once(f"torch.compile(backend='specee') decodes dense: {error}")
    if wanted.inner_backend != "inductor":
        return lookup_backend(wanted.inner_backend)(graph, list(examples))
    from eepass.private_names import compile_fx, list_mode_options

    patches = list_mode_options(mode) if mode and mode != "default" else None
    compiled: Any = compile_fx(graph, list(examples), config_patches=patches)
    return compiled


def _require_splittable(model: Any) -> None:
    """Raise ``PassError`` with the reason ``model`` is compiled whole."""
    if model is None:
        raise PassError(
            "no Hugging Face model among the variables of the compiled function has its parameters"
        )
    if model.device.type != "cpu":
        raise PassError(
            f"early exit in a single forward call runs on the CPU, and this is {model.device}"
        )
    if model.training:
        raise PassError("the model is in training mode")
