"""A decode graph of Dynamo's as a step that exits early, for whatever cache and weights it gets."""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from operator import attrgetter, itemgetter
from typing import Any

import torch
from torch import Tensor

from eepass.codegen.lower_cpu import CpuCompiler
from eepass.codegen.lower_inner import InnerCompiler
from eepass.errors import InputError, PassError
from eepass.model import ALWAYS_ACTIVE
from eepass.model_stamp import CodeStamp
from eepass.passes.caller.caller_graph import CallerGraph
from eepass.passes.pipeline import exit_segments, split_caller_step
from eepass.passes.report import PassReport
from eepass.planning import exit_tensors, make_plan
from eepass.private_names import tracing
from eepass.runtime.caller.caller_decoder import CacheState, CacheStates, CallerDecoder
from eepass.runtime.caller.caller_exits import CallerExits, CallerWeights
from eepass.runtime.exits.exits import Exits
from eepass.runtime.exits.scheduler import PredictorSchedule
from eepass.runtime.statistics import Statistics
from eepass.segments import CallerStep
from eepass.torch_compile.model_lookup import find_artifact, find_model, log, say_once
from eepass.torch_compile.options import BackendOptions

# rows of one sequence that layers are compiled for: two cost what four do
ROW_COUNTS = (4, 8)
# lengths of cache one graph is kept ready for; the oldest is forgotten first
MOST_SHAPES = 8
# sets of weights one graph is kept ready for: Dynamo gives a graph to any model it fits
MOST_WEIGHTS = 4
_VERSION = attrgetter("_version")


class EarlyExitStep:
    """A decode graph with exits, specialised for each shape of cache it is called with."""

    def __init__(
        self, caller: CallerGraph, examples: Sequence[Any], model: Any, expression: str,
        wanted: BackendOptions,
    ) -> None:  # fmt: skip
        """``model``: the one ``examples`` are of, found as ``expression``. Raises ``PassError``
        with the reason the graph cannot be split."""
        self.caller, self.wanted, self.expression = caller, wanted, expression
        # tokens that exited go along as further rows
        exits = find_artifact(model, wanted) is not None and wanted.kv == "defer"
        self._rows = ROW_COUNTS if exits else ()
        named = [*model.named_parameters(), *model.named_buffers()]
        names = {id(tensor): name for name, tensor in named}
        # another model brings other tensors in the same places
        self._weights = {
            place: names[id(tensor)]
            for place, tensor in enumerate(caller.tensors_of(examples))
            if id(tensor) in names
        }
        self._shapes: dict[tuple[int, ...], ShapedStep] = {}
        self._lock = threading.RLock()
        self._prepare(examples)

    def __call__(self, *arguments: Any) -> Any:
        shape = self._shapes.get(self.caller.key(arguments)) or self._prepare(arguments)
        logits = shape(self.caller.tensors_of(arguments))
        return self.caller.results(arguments, logits)

    def _prepare(self, arguments: Sequence[Any]) -> ShapedStep:
        """Split and compile for the sizes of ``arguments``."""
        key, tensors = self.caller.key(arguments), self.caller.tensors_of(arguments)
        with self._lock, tracing(None), torch.no_grad():
            if key not in self._shapes:
                report = PassReport()
                weights = {id(tensors[place]): name for place, name in self._weights.items()}
                step = split_caller_step(
                    self.caller.bound(arguments), tensors, weights, self._rows, report
                )
                for where, why in report.skipped:
                    log.info("%s: %s", where, why)
                made = ShapedStep(step, tensors, self.expression, self.wanted)
                while len(self._shapes) >= MOST_SHAPES:
                    del self._shapes[next(iter(self._shapes))]
                self._shapes[key] = made
            return self._shapes[key]


class ShapedStep:
    """The step for one shape of cache, with exits for each set of weights it is called with."""

    def __init__(
        self, step: CallerStep, tensors: Sequence[Tensor], expression: str, wanted: BackendOptions
    ) -> None:
        self.step, self.wanted, self.expression = step, wanted, expression
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
        # exits keep these tensors
        kept = {head.weight, head.bias, *(head.norm or head.whole).parameters}
        self._kept = [p for role, p in step.places.items() if role.name in kept]
        self._lock = threading.Lock()
        self._exits: dict[Any, CallerExits | None] = {}
        # of the model of each set of weights, as it was when its exits were made
        self._stamps: dict[Any, CodeStamp] = {}
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
        pending = None if not self.step.stacked or cache[0].is_inference() else state.pending
        active = frozenset[int]()
        if exits is not None and len(state.pending) < max(self.decoder.most_pending, 1):
            active = exits.layers
            if state.schedule is not None:
                active &= state.schedule.active()
        logits, layers = self.decoder(tensors, exits, active, pending, state.statistics)
        if state.schedule is not None:
            state.schedule.record(layers)
        state.statistics.passes += 1
        for _ in range(self.step.batch):
            state.statistics.record_exit(layers)
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
        """The exits of these weights, made where they are new."""
        parameters = self._parameters(tensors)
        # by object and count of writes; what exits keep, by address too
        addresses = tuple(tensors[place].data_ptr() for place in self._kept)
        seen = (tuple(map(id, parameters)), addresses, _versions(parameters))
        if seen not in self._exits:
            with self._lock, tracing(None), torch.no_grad():
                if seen not in self._exits:
                    model, _ = find_model([self.expression], tensors)
                    made = self._make_exits(tensors, model)
                    while len(self._exits) >= MOST_WEIGHTS:
                        oldest = next(iter(self._exits))
                        del self._exits[oldest]
                        self._stamps.pop(oldest, None)
                    if model is not None:
                        self._stamps[seen] = CodeStamp(model)
                    self._exits[seen] = made
        stamp = self._stamps.get(seen)
        if stamp is not None and (changed := stamp.change()):
            raise InputError(
                f"{changed} has changed since torch.compile traced the model, whose guards do not "
                "see it: change it back, or call torch.compiler.reset() to trace anew"
            )
        return self._exits[seen]

    def _make_exits(self, tensors: Sequence[Tensor], model: Any) -> CallerExits | None:
        if model is None:
            say_once("the model of the weights in use was not found; decoding dense")
            return None
        try:
            artifact = find_artifact(model, self.wanted)
        except InputError as error:
            if not self._exits:
                raise
            say_once(f"the weights were changed: {error}; decoding dense")
            return None
        if artifact is None:
            say_once(
                "no artefact was given or lies beside the checkpoint: no token exits early (eepass "
                "train MODEL --out DIR makes one)"
            )
            return None
        wanted, step = self.wanted, self.step
        config, head = wanted.config, step.split.head
        if not head.weight:
            raise PassError(f"early exits need single rows of the LM head: {head.reason}")
        plan = make_plan(config, artifact, self.decoder.num_layers)
        weights: Any = CallerWeights(step, tensors, self._compile)
        made = exit_tensors(config.name, artifact, weights.tensors, step.split)
        every = {**weights.tensors, **made}
        exits = Exits(weights, plan, partial(exit_segments, step.split, plan, every), made)
        full = None
        if wanted.logits == "full":
            whole = replace(plan, exits=(), verify="full")
            verify = exit_segments(step.split, whole, every, step.batch).verify
            hidden = torch.zeros(1, step.batch, weights.hidden_size, dtype=weights.dtype)
            full = weights.bind(verify, made, [hidden])
        return CallerExits(exits, step, full)


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


def _versions(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    try:
        return tuple(map(_VERSION, tensors))
    except RuntimeError:
        # made in inference mode, they count no writes
        return ()


@functools.cache
def compiler(inner: str) -> Any:
    """What compiles segments; isomorphic ones of all models share its code."""
    return CpuCompiler() if inner == "inductor" else InnerCompiler(inner)
