"""Scripted exits for decode steps, and a plain Python model of what a step does with them."""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace

import torch

from eepass.exit_rule import SCHEDULE_RADIUS, SCHEDULE_WINDOW
from eepass.runtime.step.build import build_step
from eepass.runtime.step.data import launches
from eepass.runtime.step.engine import StepEngine
from eepass.runtime.step.host import Flags, HostDriven, ResultQueue, called
from eepass.runtime.step.interpret import Interpreter
from eepass.runtime.step.layout import StepOptions

BUCKETS = (1, 2, 4, 8)


class OrderedExits:
    """In step t the predictors at ``wanted[t]`` want to exit; verification gives ``answers[t]``,
    which is among the draft tokens if the layer is at least ``known[t]``."""

    def __init__(self, layers, wanted, answers, known):
        self.plan = SimpleNamespace(draft_layer=1, draft_tokens=2)
        self.layers, self.tensors = tuple(layers), {}
        self.wanted, self.answers, self.known = wanted, answers, known
        self.turn, self.layer = -1, 0

    def draft(self, hidden):
        self.turn += 1
        return torch.tensor([[7, 8]], device=hidden.device)

    def predict(self, layer, hidden, drafts, previous):
        self.layer = layer
        wants = self.turn < len(self.wanted) and layer in self.wanted[self.turn]
        return torch.tensor([wants]), previous + 1, hidden.clone()

    def verify(self, z, drafts):
        # steps launched after the end run past the script
        turn = min(self.turn, len(self.answers) - 1)
        return torch.tensor([self.answers[turn]]), torch.tensor([self.layer >= self.known[turn]])


class PlainSteps:
    """Early exit with deferred tokens in plain lists: which exit points are evaluated, where a
    token exits, which tokens are pending."""

    def __init__(self, plain, prompt, first, depth, exits, pending, ranking=(), always=2):
        self.plain, self.ids, self.depth = plain, [*prompt, first], depth
        self.exits, self.limit = sorted(exits), pending
        self.fixed = set(ranking[:always]) if ranking else set(exits)
        self.recent = deque([depth], maxlen=SCHEDULE_WINDOW)
        # how many layers each pending token has been through
        self.pending = []
        self.exit_layers = []
        self.counts = dict.fromkeys(("predictors_run", "wanted", "refused", "full_heads"), 0)
        self.caught_up = 0

    def step(self, wanted, answer, known):
        near = {e for e in self.exits for r in self.recent if abs(e - r) <= SCHEDULE_RADIUS}
        active = (self.fixed | near) & set(self.exits)
        if len(self.pending) >= self.limit:
            active &= {self.depth}
        token, layer = None, self.depth
        for exit_layer in sorted(active):
            self.counts["predictors_run"] += 1
            if exit_layer in wanted:
                self.counts["wanted"] += 1
                if exit_layer >= known:
                    token, layer = answer, exit_layer
                    break
                self.counts["refused"] += 1
        if token is None:
            token = self.plain.next_token(self.ids)
            self.counts["full_heads"] += 1
        self.caught_up += sum(seen < layer for seen in self.pending)
        self.pending = [max(seen, layer) for seen in [*self.pending, 0]]
        self.pending = [seen for seen in self.pending if seen < self.depth]
        self.recent.append(layer)
        self.ids.append(token)
        self.exit_layers.append(layer)
        return token, layer


class LateFlags:
    """Flags as from a GPU: a copy is known only once it was waited for."""

    def __init__(self, flags):
        self.flags, self.copies, self.arrived = flags, {}, None
        self.number = self.synchronisations = 0

    def post(self):
        self.number += 1
        self.copies[self.number] = self.flags.clone()
        return self.number

    def wait(self, number):
        self.synchronisations += 1
        self.arrived = self.copies[number]

    def known(self, flag):
        assert self.arrived is not None, "the host reads flags that never arrived"
        return bool(self.arrived[flag.storage_offset()])


class LateResultQueue(ResultQueue):
    """Results as from a GPU; ``most``: how many steps were in flight."""

    def __init__(self, out):
        super().__init__(out)
        self.most = 0

    def post(self):
        super().post()
        self.most = max(self.most, len(self._sent))


def engine_for(decoder, exits=None, how="interpret", watch=False, in_flight=2, **options):
    """An engine over a new step; ``how``: its executor."""
    settings = StepOptions(**{"buckets": BUCKETS, **options})
    step = build_step(decoder, exits, settings)
    if how == "interpret":
        executor = Interpreter(step, watch=watch)
    elif how == "predicated":
        executor = Interpreter(step.flattened(), watch=watch)
    elif how == "late":
        executor = HostDriven(step, LateFlags(step.flags), called(step))
    else:
        executor = HostDriven(step, Flags(), called(step))
    return StepEngine(decoder, step, executor, LateResultQueue(step["out"]), in_flight)


def names(step):
    return [launch.name for launch in launches(step.items)]
