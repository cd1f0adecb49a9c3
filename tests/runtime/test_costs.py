"""What passes cost: least times, which one disturbance cannot raise, corrected by later passes."""

import pytest

from eepass.runtime.decoder.costs import AGE, RECENT, PassCosts, least_seconds
from eepass.runtime.drafting.planner import Planner

# seconds of a pass by row count, on an idle machine
TRUE = {1: 0.038, 4: 0.040, 8: 0.045}


class Clock:
    """A clock that passes work alone moves on: in work number n by ``slower[n]`` times its cost."""

    def __init__(self, slower=()):
        self.now, self.works, self.slower = 0.0, 0, dict(slower)

    def __call__(self):
        return self.now

    def work(self, seconds):
        self.now += seconds * self.slower.get(self.works, 1.0)
        self.works += 1


def measured(clock):
    works = {rows: lambda seconds=seconds: clock.work(seconds) for rows, seconds in TRUE.items()}
    return least_seconds(works, clock)


@pytest.mark.parametrize("busy", [[5], range(3, 12), range(6, 24, 2)])
def test_a_machine_that_is_busy_for_a_while_does_not_change_what_is_measured(busy):
    assert measured(Clock({number: 8.2 for number in busy})) == pytest.approx(TRUE)


def test_a_start_on_a_busy_machine_is_corrected_by_the_first_pass():
    planner = Planner(measured(Clock({number: 8.2 for number in range(100)})))
    assert planner.costs[1] == pytest.approx(0.312, abs=1e-3)
    planner.observe(1, TRUE[1])
    # the others, which have not been run, were measured in the same moment
    assert planner.costs == pytest.approx(TRUE)
    planner.observe(7, 0.047)
    # the least of the last few, what was known before among them
    assert planner.costs[8] == pytest.approx(0.045)
    planner.observe(9, 0.001)
    assert planner.costs[8] == pytest.approx(0.045) and planner.costs[1] == pytest.approx(0.038)


def test_one_disturbed_pass_does_not_count_and_a_slower_machine_is_noticed():
    costs = PassCosts(TRUE)
    costs.observe(1, TRUE[1])
    costs.observe(1, 5.0)
    assert costs == pytest.approx(TRUE)
    for _ in range(RECENT):
        costs.observe(1, 2 * TRUE[1])
    assert costs[1] == pytest.approx(2 * TRUE[1])
    assert costs[8] == pytest.approx(2 * TRUE[8])


def test_what_more_rows_cost_now_says_what_fewer_do_only_if_that_is_less():
    costs = PassCosts(TRUE)
    for rows in (1, 8):
        costs.observe(rows, TRUE[rows])
    for _ in range(2 * AGE):
        costs.observe(8, 3 * TRUE[8])
    # not taken to have become slower with it: trying it shows that
    assert costs[8] == pytest.approx(3 * TRUE[8]) and costs[1] == pytest.approx(TRUE[1])
    costs.observe(1, 1.2 * TRUE[1])
    assert costs[1] == pytest.approx(1.2 * TRUE[1])
    for _ in range(2 * AGE):
        costs.observe(8, 0.5 * TRUE[8])
    assert costs[1] < 0.6 * TRUE[1]


def test_planners_do_not_share_what_they_observe():
    one, two = Planner(TRUE), Planner(TRUE)
    one.observe(1, 0.01)
    assert one.costs[1] == 0.01 and two.costs[1] == TRUE[1] == 0.038
