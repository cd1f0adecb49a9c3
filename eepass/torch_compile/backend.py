"""``torch.compile(model, backend="specee", options={…})``: one decode step that may leave early.

A graph that decodes one token a sequence over a static cache becomes layers, predictors and exits;
any other goes to the inner backend whole. What a call returns and leaves in the cache is what the
model returns and leaves, save that after an exit the logits are those of the boundary the token
left at, and the deeper layers' keys and values are projected from it.
"""

from __future__ import annotations

import functools
import gc
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.backends.registry import lookup_backend
from torch._guards import tracing
from torch.fx import GraphModule

from eepass.checkpoints.artifact import Artifact, found_artifact, load_artifact, refuse_other_model
from eepass.checkpoints.quantized_weights import weights_to_read
from eepass.codegen.lower_cpu import CpuCompiler
from eepass.codegen.lower_inner import InnerCompiler
from eepass.errors import InputError, PassError
from eepass.model import ALWAYS_ACTIVE
from eepass.passes.caller.caller_graph import CallerGraph
from eepass.passes.pipeline import exit_segments, split_caller_step
from eepass.passes.report import PassReport
from eepass.plan import ExitSegments
from eepass.planning import exit_tensors, make_plan
from eepass.runtime.cache.weight_memory import settle_weights
from eepass.runtime.caller.cache_states import CacheState, CacheStates
from eepass.runtime.caller.caller_decoder import CallerDecoder
from eepass.runtime.caller.caller_exits import CallerExits, Weights
from eepass.runtime.exits.exits import Exits
from eepass.runtime.exits.scheduler import PredictorSchedule
from eepass.runtime.statistics import Statistics
from eepass.segments import CallerStep
from eepass.torch_compile.options import BackendOptions

log = logging.getLogger("eepass")
# rows of one sequence that layers are compiled for: two cost what four do
ROW_COUNTS = (4, 8)
# lengths of cache one graph is kept ready for; the oldest is forgotten first
MOST_SHAPES = 8
# sets of weights one graph is kept ready for: Dynamo gives a graph to any model it fits
MOST_WEIGHTS = 4
Run = Callable[..., Any]
_VERSION = attrgetter("_version")


def specee(
    graph: GraphModule,
    examples: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Run:
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
        return _whole(graph, examples, mode, wanted.inner_backend)
    owner = _owner(caller.tensors_of(examples))
    reason = _no_exits(owner, wanted)
    if reason:
        say_once(f"torch.compile(backend='specee') decodes dense: {reason}")
        return _whole(graph, examples, mode, wanted.inner_backend)
    # before exits note where the weights lie
    with torch.no_grad():
        settle_weights(weights_to_read(owner))
    step = _Step(caller, owner, wanted)
    try:
        step.prepare(examples)
    except PassError as error:
        say_once(f"torch.compile(backend='specee') decodes dense: {error}")
        return _whole(graph, examples, mode, wanted.inner_backend)
    return step


def _room(step: CallerStep, tensors: Sequence[Tensor]) -> tuple[tuple[int, int], ...]:
    """Places of lengths, and the slots their layers have: one for each number of slots."""
    grown = dict(step.advance)
    found: dict[int, int] = {}
    for layer in step.split.layers:
        for role in layer.inputs:
            place = step.places.get(role)
            if role.kind == "slots" and place in grown:
                keys = next(step.places[r] for r in layer.inputs if r.kind == "keys")
                found.setdefault(int(tensors[keys].shape[2]), place)
    return tuple((place, slots) for slots, place in found.items())


def _no_exits(owner: Any, wanted: BackendOptions) -> str:
    if owner is None:
        return "no Hugging Face model that is alive has these parameters"
    if owner.device.type != "cpu":
        return f"early exit in a single forward call runs on the CPU, and this is {owner.device}"
    if owner.training:
        return "the model is in training mode"
    if find_artifact(owner, wanted) is None:
        return (
            "no artefact was given or lies beside the checkpoint "
            "(eepass train MODEL --out DIR makes one)"
        )
    return ""


class _Step:
    """A decode graph with exits, specialised for each shape of cache it is called with."""

    def __init__(self, caller: CallerGraph, owner: Any, wanted: BackendOptions) -> None:
        self.caller, self.wanted = caller, wanted
        self._weights = {id(tensor): name for name, tensor in _named(owner)}
        self._shapes: dict[tuple[int, ...], _Shape] = {}
        self._lock = threading.RLock()

    def __call__(self, *arguments: Any) -> Any:
        shape = self._shapes.get(self.caller.key(arguments)) or self.prepare(arguments)
        logits = shape(self.caller.tensors_of(arguments))
        return self.caller.results(arguments, logits)

    def prepare(self, arguments: Sequence[Any]) -> _Shape:
        """Split and compile for the sizes of ``arguments``; raises ``PassError`` with the reason
        that cannot be done."""
        key, tensors = self.caller.key(arguments), self.caller.tensors_of(arguments)
        with self._lock, tracing(None), torch.no_grad():
            if key not in self._shapes:
                report = PassReport()
                rows = ROW_COUNTS if self.wanted.kv == "defer" else ()
                step = split_caller_step(
                    self.caller.bound(arguments), tensors, self._weights, rows, report
                )
                for where, why in report.skipped:
                    log.info("%s: %s", where, why)
                while len(self._shapes) >= MOST_SHAPES:
                    del self._shapes[next(iter(self._shapes))]
                self._shapes[key] = _Shape(step, tensors, self.wanted)
            return self._shapes[key]


class _Shape:
    """The step for one shape, and the exits for the weights it is called with."""

    def __init__(self, step: CallerStep, tensors: Sequence[Tensor], wanted: BackendOptions) -> None:
        self.step, self.wanted = step, wanted
        self._compile = compiler(wanted.inner_backend)
        self.decoder = CallerDecoder(step, tensors, self._compile)
        parameters = [p for role, p in step.places.items() if role.kind == "parameter"]
        self._parameters = itemgetter(*parameters)
        self._room = _room(step, tensors)
        # tensors of the deepest and the first layer tell of all: looking at more costs time
        lengths = [place for place, _ in step.advance]
        watched = [step.caches[0], step.caches[-1], *lengths[:1], *lengths[-1:]]
        self._written = itemgetter(*dict.fromkeys(watched))
        head = step.split.head
        bound = {
            *head.parts.values(),
            head.bias,
            *(r.name for r in (head.norm or head.whole).inputs),
        }
        self._bound = [p for role, p in step.places.items() if role.name in bound]
        self._lock = threading.Lock()
        self._exits: dict[Any, CallerExits | None] = {}
        self._states = CacheStates()
        self._exits_for(tensors)

    def __call__(self, tensors: Sequence[Tensor]) -> Tensor:
        for length, slots in self._room:
            # beyond the end there is other memory
            if tensors[length] >= slots:
                raise InputError(
                    f"the static cache is full at {slots} tokens: make it longer (max_cache_len), "
                    "or ask for fewer new tokens"
                )
        exits, cache = self._exits_for(tensors), self._written(tensors)
        state = self._states.take(cache, partial(self._fresh, exits))
        waiting = None if not self.step.stacked or cache[0].is_inference() else state.waiting
        active = frozenset[int]()
        if exits is not None and len(state.waiting) < max(self.decoder.most_waiting, 1):
            active = exits.layers
            if state.schedule is not None:
                active &= state.schedule.active()
        logits, layers = self.decoder(tensors, exits, active, waiting, state.statistics)
        if state.schedule is not None:
            state.schedule.record(layers)
        state.statistics.passes += 1
        for _ in range(self.step.batch):
            state.statistics.left_at(layers)
        self._states.keep(cache, state)
        if self.wanted.stats is not None:
            self.wanted.stats(state.statistics)
        return logits

    def _fresh(self, exits: CallerExits | None) -> CacheState:
        schedule = None
        if self.wanted.schedule and exits is not None:
            schedule = PredictorSchedule(exits.exits.plan.ranking, ALWAYS_ACTIVE)
        return CacheState(schedule, Statistics(self.decoder.num_layers))

    def _exits_for(self, tensors: Sequence[Tensor]) -> CallerExits | None:
        """The exits of these weights; weights not seen before are looked at first."""
        parameters = self._parameters(tensors)
        # by object and count of writes; what exits hold themselves, by address too
        addresses = tuple(tensors[place].data_ptr() for place in self._bound)
        seen = (tuple(map(id, parameters)), addresses, _versions(parameters))
        if seen not in self._exits:
            with self._lock, tracing(None), torch.no_grad():
                if seen not in self._exits:
                    made = self._make_exits(tensors)
                    while len(self._exits) >= MOST_WEIGHTS:
                        del self._exits[next(iter(self._exits))]
                    self._exits[seen] = made
        return self._exits[seen]

    def _make_exits(self, tensors: Sequence[Tensor]) -> CallerExits | None:
        owner = _owner(tensors)
        try:
            artifact = find_artifact(owner, self.wanted) if owner is not None else None
        except InputError as error:
            if not self._exits:
                raise
            say_once(f"the weights were changed: {error}; decoding dense")
            return None
        if artifact is None:
            return None
        wanted, step = self.wanted, self.step
        config, head = wanted.config, step.split.head
        if not head.weight:
            raise PassError(f"early exits need single rows of the LM head: {head.reason}")
        plan = make_plan(config, artifact, self.decoder.num_layers)
        weights = Weights(step, tensors, self._compile)
        made = exit_tensors(config.name, artifact, weights.tensors, step.split)
        every = {**weights.tensors, **made}

        def segments(rows: int) -> ExitSegments:
            return exit_segments(step.split, plan, every, rows)

        exits = Exits(weights, plan, segments, made)  # type: ignore[arg-type]
        full = None
        if wanted.logits == "full":
            whole = replace(plan, exits=(), verify="full")
            verify = exit_segments(step.split, whole, every, step.batch).verify
            hidden = torch.zeros(1, step.batch, weights.hidden_size, dtype=weights.dtype)
            full = weights.bind(verify, made, [hidden])
        found = CallerExits(exits, step, full)
        found.prepare()
        return found


def _versions(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    try:
        return tuple(map(_VERSION, tensors))
    except RuntimeError:
        # made in inference mode, they count no writes
        return ()


def find_artifact(owner: Any, wanted: BackendOptions) -> Artifact | None:
    """The artefact asked for, or one of this model beside its checkpoint or shipped with eepass.

    Raises ``InputError`` where the one asked for is damaged or of another model.
    """
    asked = wanted.artifact is not None
    folder = Path(wanted.artifact) if wanted.artifact is not None else found_artifact(owner)
    if folder is None:
        return None
    artifact = load_artifact(folder)
    try:
        refuse_other_model(artifact, owner, folder)
    except InputError as error:
        if asked:
            raise
        say_once(f"torch.compile(backend='specee'): {error}")
        return None
    return artifact


def _owner(tensors: Sequence[Tensor]) -> Any:
    """The causal LM alive whose parameters are among ``tensors``; Dynamo passes them without it."""
    known = {id(tensor) for tensor in tensors}
    for thing in gc.get_objects():
        # by type: looking at a proxy would wake it
        if issubclass(type(thing), torch.nn.Module) and hasattr(thing, "get_output_embeddings"):
            parameters = {id(parameter) for parameter in thing.parameters()}
            if parameters and parameters <= known and thing.get_output_embeddings() is not None:
                return thing
    return None


def _named(owner: Any) -> list[tuple[str, Tensor]]:
    return [*owner.named_parameters(), *owner.named_buffers()]


def _whole(graph: GraphModule, examples: Sequence[Any], mode: str | None, inner: str) -> Any:
    if inner == "inductor":
        from torch._inductor import list_mode_options
        from torch._inductor.compile_fx import compile_fx

        patches = list_mode_options(mode) if mode and mode != "default" else None
        return compile_fx(graph, list(examples), config_patches=patches)
    return lookup_backend(inner)(graph, list(examples))


@functools.cache
def compiler(inner: str) -> Any:
    """What compiles segments; isomorphic ones of all models share its code."""
    return CpuCompiler() if inner == "inductor" else InnerCompiler(inner)


@functools.cache
def say_once(message: str) -> None:
    """Log ``message``, the first time it is said."""
    log.warning(message)
