"""Which model one of Dynamo's graphs belongs to, and that model's artefact.

Dynamo hands a backend the tensors of a model without the model, but it knows an expression for
each: ``L['self']._modules['lm_head']._parameters['weight']``, over the variables of the function it
compiles. A prefix of such an expression is the model. While Dynamo compiles, it holds the
variables. Later it runs the same graph for any model that fits; then the variables are those of
the frame that calls the graph.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule

from eepass.checkpoints.artifact import Artifact, load_artifact
from eepass.checkpoints.fitting_artifact import found_artifact, refuse_other_model
from eepass.errors import InputError
from eepass.private_names import InstructionTranslator
from eepass.torch_compile.options import BackendOptions
from eepass.wrappers import compiled_inside

log = logging.getLogger("eepass")


@functools.cache
def say_once(message: str) -> None:
    """Warn with ``message``, once in a process."""
    log.warning(message)


def find_model(expressions: Sequence[str], tensors: Sequence[Tensor]) -> tuple[Any, str]:
    """The causal LM whose parameters are among ``tensors``, and which of ``expressions`` it is.

    (None, "") where it is none of them.
    """
    known = {id(tensor) for tensor in tensors}
    for variables in _scopes():
        for expression in expressions:
            try:
                # as Dynamo's guards evaluate it
                found = eval(expression, variables)
            except Exception:
                # other frames have other things under these names, and getters may raise anything
                continue
            found = compiled_inside(found)
            if _is_model_of(found, known):
                return found, expression
    return None, ""


def expressions_of(graph: GraphModule) -> list[str]:
    """The expressions of all inputs of ``graph``, and all prefixes of them, shortest first."""
    found: dict[str, None] = {}
    for node in graph.graph.find_nodes(op="placeholder"):
        source: Any = getattr(node, "_dynamo_source", None)
        while source is not None:
            # a method before torch 2.13
            found[source.name if isinstance(source.name, str) else source.name()] = None
            source = getattr(source, "base", None)
    return sorted(found, key=len)


def find_artifact(model: Any, wanted: BackendOptions) -> Artifact | None:
    """The artefact asked for, or one of this model beside its checkpoint or shipped with eepass;
    None where it has no exits.

    Raises ``InputError`` where the one asked for is damaged or of another model.
    """
    asked = wanted.artifact
    folder = found_artifact(model) if asked is None else asked
    if folder is None:
        return None
    artifact = load_artifact(folder)
    try:
        refuse_other_model(artifact, model, folder)
    except InputError as error:
        if asked is not None:
            raise
        say_once(f"torch.compile(backend='specee'): {error}")
        return None
    # a draft head alone drafts for the engine
    return artifact if artifact.presets else None


def _scopes() -> Iterator[dict[str, Any]]:
    """Local and global variables, "L" and "G": of the function being compiled, else of each
    caller."""
    try:
        output = InstructionTranslator.current_tx().output
    except AttributeError:
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            yield {"L": frame.f_locals, "G": frame.f_globals}
            frame = frame.f_back
    else:
        yield {"L": output.local_scope, "G": output.global_scope}


def _is_model_of(found: Any, known: set[int]) -> bool:
    if not isinstance(found, nn.Module):
        return False
    head_of: Any = getattr(found, "get_output_embeddings", None)
    if head_of is None or head_of() is None:
        return False
    parameters = {id(parameter) for parameter in found.parameters()}
    return bool(parameters) and parameters <= known
