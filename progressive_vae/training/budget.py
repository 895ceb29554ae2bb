"""The time of a run with `max_train_minutes`: fits and report end when it is over."""

import math
import time
from collections.abc import Callable

REPORT_SHARE = 0.1  # of the time of a run, for metrics and images
MAX_REPORT_SECONDS = 120.0
MAX_DELAY_SHARE = 0.5  # of a phase, by which it is shortened for what came before it


class TimeBudget:
    """The clock of a run, which starts when the budget is made.

    Phases follow a plan: each ends where all before it were planned to end, plus its own duration.
    What takes time between them, as reading images and saving, shortens the next phase. The last
    tenth of the time, at most two minutes, is left for the report.

    Args:
        minutes: of the run; `None`: no limit.
        clock: returns seconds.
    """

    def __init__(self, minutes: float | None, clock: Callable[[], float] = time.perf_counter):
        self.seconds = math.inf if minutes is None else 60 * minutes
        self.report_seconds = min(REPORT_SHARE * self.seconds, MAX_REPORT_SECONDS)
        self.fit_seconds = self.seconds - self.report_seconds
        self.clock = clock
        self.start = clock()
        self._planned_end = self.start  # of the phases so far

    def begin_phase(self, seconds: float | None) -> tuple[float, float | None]:
        """Return when the clock of the next phase starts, and its duration in seconds.

        Args:
            seconds: the phase's share of all seconds, a part of which is for the report; `None`:
                the phase is limited by its steps.
        """
        now = self.clock()
        if seconds is None or math.isinf(self.seconds):
            return now, seconds
        duration = seconds * self.fit_seconds / self.seconds
        # A phase that a resumed run skips ends before its plan.
        start = min(now, max(self._planned_end, now - MAX_DELAY_SHARE * duration))
        self._planned_end = start + duration
        return start, duration

    def begin_fit(self, start: float, duration: float | None) -> float:
        """Return when the clock of a phase's fit starts. What the phase did before, as encoding the
        images, shortens the fit by at most half of the phase.

        Args:
            start, duration: of the phase, by `begin_phase`.
        """
        if duration is None:
            return start
        later = max(start, self.clock() - MAX_DELAY_SHARE * duration)
        self._planned_end += later - start
        return later

    def seconds_for_report(self) -> float | None:
        """Return the seconds that the report may take: those that are left, at least half and at
        most all of its reserve; `None` without a limit."""
        if math.isinf(self.seconds):
            return None
        left = self.start + self.seconds - self.clock()
        return min(max(left, self.report_seconds / 2), self.report_seconds)
