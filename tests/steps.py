"""Exits by order for decode steps, and plainly what a step has to do with them."""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace

import torch

from eepass.runtime.step.build import build_step
from eepass.runtime.step.data import launches
from eepass.runtime.step.engine import StepEngine
from eepass.runtime.step.host import HostDriven, HostFlags, called
from eepass.runtime.step.interpret import Interpreter
from eepass.runtime.step.layout import StepOptions
from eepass.runtime.step.results import HostResultQueue

BUCKETS = (1, 2, 4, 8)


class OrderedExits:
    """In step t the predictors at ``wanted[t]`` want to leave; verification says ``answers[t]``,
    and that it is known where the layer is at least ``known[t]``."""

    def __init__(self, layers, wanted, answers, known):
        self.plan = SimpleNamespace(draft_layer=1, draft_tokens=2)
        self.layers, self.tensors = tuple(layers), {}
        self.wanted, self.answers, self.known = wanted, answers, known
        self.turn, self.layer = -1, 0
        self.asked = []

    def draft(self, hidden):
        self.turn += 1
        return torch.tensor([[7, 8]], device=hidden.device)

    def predict(self, layer, hidden, drafts, previous):
        self.layer = layer
        wants = self.turn < len(self.wanted) and layer in self.wanted[self.turn]
        return torch.tensor([wants]), previous + 1, hidden.clone()

    def verify(self, z, drafts):
        # in a step launched whatever the flags say there may be no order any more
        turn = min(self.turn, len(self.answers) - 1)
        return torch.tensor([self.answers[turn]]), torch.tensor([self.layer >= self.known[turn]])


class PlainSteps:
    """What early exit with deferred tokens is, in lists: which layers are asked, where a token
    leaves, who waits."""

    def __init__(self, plain, prompt, first, depth, exits, pending, ranking=(), always=2):
        self.plain, self.ids, self.depth = plain, [*prompt, first], depth
        self.exits, self.limit = sorted(exits), pending
        self.fixed = set(ranking[:always]) if ranking else set(exits)
        self.recent = deque([depth], maxlen=5)
        # how many layers each token that waits has been through
        self.waiting = []
        self.left = []
        self.counts = dict.fromkeys(("predictors_run", "wanted", "refused", "full_heads"), 0)
        self.caught_up = 0

    def step(self, wanted, answer, known):
        near = {e for e in self.exits for r in self.recent if abs(e - r) <= 2}
        active = (self.fixed | near) & set(self.exits)
        if len(self.waiting) >= self.limit:
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
        self.caught_up += sum(seen < layer for seen in self.waiting)
        self.waiting = [max(seen, layer) for seen in [*self.waiting, 0]]
        self.waiting = [seen for seen in self.waiting if seen < self.depth]
        self.recent.append(layer)
        self.ids.append(token)
        self.left.append(layer)
        return token, layer


class LateFlags:
    """Flags as from a GPU: what was sent is known only once it was waited for."""

    def __init__(self, flags):
        self.flags, self.sent, self.there = flags, {}, None
        self.number = self.synchronisations = 0

    def post(self):
        self.number += 1
        self.sent[self.number] = self.flags.clone()
        return self.number

    def wait(self, number):
        self.synchronisations += 1
        self.there = self.sent[number]

    def known(self, flag):
        assert self.there is not None, "the host goes by flags it was never sent"
        return bool(self.there[flag.storage_offset()])


class LateResultQueue(HostResultQueue):
    """ResultQueue as from a GPU: the last step's is there only once another follows, or all is done."""

    def __init__(self, out):
        super().__init__(out)
        self.most = 0

    def post(self):
        super().post()
        self.most = max(self.most, len(self._sent))


def engine_for(decoder, exits=None, how="interpret", watch=False, in_flight=2, **options):
    """An engine over a new step; ``how``: an executor, or a way of running one."""
    settings = StepOptions(**{"buckets": BUCKETS, **options})
    step = build_step(decoder, exits, settings)
    if how == "interpret":
        executor = Interpreter(step, watch=watch)
    elif how == "predicated":
        executor = Interpreter(step, watch=watch, always=True)
    elif how == "late":
        executor = HostDriven(step, LateFlags(step.flags), called(step))
    else:
        executor = HostDriven(step, HostFlags(), called(step))
    return StepEngine(decoder, step, executor, LateResultQueue(step["out"]), in_flight)


def names(step):
    return [launch.name for launch in launches(step.items)]
