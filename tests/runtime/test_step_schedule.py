"""The schedule of the step on the device and of the engine on the host: one rule, one window."""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import eager_compile
from steps import OrderedExits

from eepass import exit_rule
from eepass.runtime.decoder.decoder import Decoder
from eepass.runtime.exits.scheduler import PredictorSchedule
from eepass.runtime.step import updates
from eepass.runtime.step.build import build_step
from eepass.runtime.step.data import launches
from eepass.runtime.step.layout import StepOptions

LAYERS = 30


def begin(step, exit_layers):
    """The active exit points of a step after tokens with these exit layers."""
    step["ring"].fill_(updates.NEVER)
    window = step["ring"].numel()
    last = exit_layers[-window:]
    step["ring"][window - len(last) :] = torch.tensor(last, dtype=torch.long)
    (launch,) = [launch for launch in launches(step.items) if launch.name == "begin"]
    launch.run(step.given(launch))
    return set(step["active"].nonzero().flatten().tolist())


def on_the_host(ranking, always, exit_layers):
    schedule = PredictorSchedule(ranking, always)
    for layer in exit_layers:
        schedule.record(layer)
    return set(schedule.active())


@pytest.fixture(scope="module")
def decoder(llama_splits):
    return Decoder(llama_splits, eager_compile)


def on_the_device(ranking, always, exit_layers):
    """``begin`` alone, with more layers than the decoder of the tests has."""
    ring = torch.full((exit_rule.SCHEDULE_WINDOW,), updates.NEVER)
    exits = torch.tensor([layer in ranking for layer in range(LAYERS + 1)])
    fixed = torch.tensor([layer in ranking[:always] for layer in range(LAYERS + 1)])
    for layer in exit_layers:
        ring = torch.cat([ring[1:], torch.tensor([layer])])
    active = torch.zeros(LAYERS + 1, dtype=torch.bool)
    rows, flag = torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.bool)
    updates.begin(
        stopped=flag.clone(), position=rows.clone(), ring=ring, exits=exits, fixed=fixed,
        starts=rows.clone(), buckets=torch.tensor([[0], [1]]), hidden=torch.zeros(1, 1, 2),
        depth=rows.clone(), run=flag.clone(), rows=rows.clone(), active=active,
        go=flag[None].clone(), more=flag.clone(), live=flag[None].clone(),
        slots=rows[None].clone(), fill=flag.clone(), needs_head=flag.clone(),
        previous=torch.zeros(1, 2), answer=rows.clone(), exit_layer=rows.clone(),
        pending=-1, scratch=100,
    )  # fmt: skip
    return set(active.nonzero().flatten().tolist())


histories = st.lists(st.integers(1, LAYERS), max_size=12)
rankings = st.lists(st.integers(1, LAYERS), min_size=1, max_size=8, unique=True)


@settings(max_examples=200, deadline=None)
@given(ranking=rankings, always=st.integers(0, 3), exit_layers=histories)
def test_any_history_gives_the_same_active_exits(ranking, always, exit_layers):
    expected = on_the_host(ranking, always, exit_layers)
    assert on_the_device(ranking, always, exit_layers) == expected


@pytest.mark.parametrize("name, value", (("SCHEDULE_RADIUS", 0), ("SCHEDULE_WINDOW", 2)))
def test_a_changed_constant_changes_both(monkeypatch, decoder, name, value):
    def both():
        # exits at 1 and 4, then twice at 4: near 1 only within the usual window
        exit_layers = [1, 4, 4] if name == "SCHEDULE_WINDOW" else [3]
        exits = OrderedExits((1, 2, 4), [], [1], [1])
        step = build_step(decoder, exits, StepOptions(ranking=(4, 1, 2), always=0))
        return begin(step, exit_layers), on_the_host((4, 1, 2), 0, exit_layers)

    device, host = both()
    assert device == host
    for module in [m for n, m in sys.modules.items() if n.startswith("eepass")]:
        if hasattr(module, name):
            monkeypatch.setattr(module, name, value)
    changed_device, changed_host = both()
    assert changed_device == changed_host != host
