"""The time of a run, on a clock that a test sets."""

import pytest

from progressive_vae.training.budget import TimeBudget


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


def run_phases(budget, clock, shares, delay):
    """Run phases that end on time, after a delay before each; return their durations."""
    durations = []
    for share in shares:
        clock.now += delay
        start, seconds = budget.begin_phase(share)
        clock.now = max(clock.now, start + seconds)
        durations.append(start + seconds)
    return durations


@pytest.mark.parametrize("minutes", [0.5, 3, 30, 600])
@pytest.mark.parametrize("delay", [0.0, 1.0])
def test_a_run_ends_in_its_time(clock, minutes, delay):
    """Reading, saving and all phases; what is left is for the report."""
    budget = TimeBudget(minutes, clock)
    total = 60 * minutes
    run_phases(budget, clock, [0.6 * total, 0.3 * total, 0.1 * total], delay)
    report = budget.seconds_for_report()
    assert report == pytest.approx(min(0.1 * total, 120))
    assert clock.now + report == pytest.approx(100 + total)


def test_without_delays_phases_have_their_shares(clock):
    budget = TimeBudget(10, clock)
    ends = run_phases(budget, clock, [300, 200, 100], 0)
    assert ends == pytest.approx([100 + 270, 100 + 450, 100 + 540])


def test_a_long_delay_takes_half_of_a_phase(clock):
    """The rest of it shortens the next phase."""
    budget = TimeBudget(10, clock)  # 54 seconds for a phase with a share of 60
    clock.now += 80
    start, seconds = budget.begin_phase(60)
    assert clock.now - start == pytest.approx(27) and seconds == pytest.approx(54)
    clock.now = start + seconds
    start, seconds = budget.begin_phase(540)
    assert start == pytest.approx(clock.now)


def test_a_fit_has_at_least_half_of_its_phase(clock):
    """Also where the phase first encodes many images."""
    budget = TimeBudget(10, clock)
    start, seconds = budget.begin_phase(60)
    assert budget.begin_fit(start, seconds) == start
    clock.now += 200
    start = budget.begin_fit(start, seconds)
    assert clock.now - start == pytest.approx(27)
    clock.now = start + seconds
    start, _ = budget.begin_phase(540)
    assert start == pytest.approx(clock.now)


def test_a_phase_that_was_done_before_takes_no_time(clock):
    budget = TimeBudget(10, clock)
    budget.begin_phase(400)  # and nothing to do
    assert budget.begin_phase(200) == (clock.now, pytest.approx(180))


def test_a_report_after_the_end_has_half_of_its_reserve(clock):
    budget = TimeBudget(10, clock)
    clock.now += 1000
    assert budget.seconds_for_report() == pytest.approx(30)


def test_no_limit(clock):
    budget = TimeBudget(None, clock)
    assert budget.begin_phase(None) == (clock.now, None)
    assert budget.seconds_for_report() is None
