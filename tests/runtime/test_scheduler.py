import torch
from hypothesis import given
from hypothesis import strategies as st

from eepass.exit_rule import SCHEDULE_WINDOW, near_last_exits
from eepass.runtime.exits.scheduler import HISTORY, PredictorSchedule


def test_all_exits_are_active_until_something_is_known():
    assert PredictorSchedule((8, 4, 6), 1).active() == {4, 6, 8}


def test_the_most_frequent_and_the_neighbours_of_recent_exits():
    schedule = PredictorSchedule((30, 22, 26, 18, 10), 1)
    schedule.record(20)
    assert schedule.active() == {30, 22, 18}
    schedule.record(10)
    assert schedule.active() == {30, 22, 18, 10}


@given(st.lists(st.integers(1, 30), min_size=1, max_size=200))
def test_it_remembers_a_window_and_no_more(exits):
    schedule = PredictorSchedule(tuple(range(1, 31)), 0)
    for layer in exits:
        schedule.record(layer)
    assert len(schedule.recent) <= HISTORY
    # the rule that the device follows
    layers = torch.arange(1, 31)
    near = near_last_exits(layers, torch.tensor(exits[-SCHEDULE_WINDOW:]))
    assert schedule.active() == set(layers[near].tolist())


def test_a_new_sequence_starts_afresh():
    schedule = PredictorSchedule((3, 9), 0)
    schedule.record(9)
    assert schedule.active() == {9}
    assert schedule.fresh().active() == {3, 9}
