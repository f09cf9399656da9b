"""Schedules the runs of an adaptive drafter: which compiled program decodes next, and for how many forward passes.

Every program continues from the same state, so the output does not depend on the schedule. There are two kinds:

    fixed       every forward pass runs the first w nodes of the tree, for one of the drafter's widths
    adaptive    the policy chooses the width of each pass (`adaptive.py`), at a small cost per pass

First the root alone is timed. If its passes are long, the policy is worth its cost: after two runs of every width, the
second of which are timed, the adaptive program decodes everything else. Until nothing is being compiled, the root alone
decodes. If the
passes are short, the policy's cost would matter, and runs of the root alone and of a few nodes alternate instead:
mostly the faster one, measured in tokens per second.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from msn_jax.decode.adaptive import UNFORCED
from msn_jax.decode.pass_times import PassTimes

_LONG_PASS = 0.002  # seconds
_TIMING_SECONDS = 0.003  # of one timed run
_MAX_TIMED_PASSES = 16
_WAIT_SECONDS = 0.1  # of one run while the adaptive program is compiled
_RUN_SECONDS = 0.02  # of one run of a fixed width; reading its result takes about 0.2 ms
_COMPARE_EVERY = 24  # runs; one of them is of the slower width,
_COMPARE_FIRST = 4  # instead, among the first `_COMPARE_EVERY` runs, because the first measurements may be wrong
_COMPARE_SECONDS = 0.006  # and as short as this
_NEWEST = 0.3  # weight of the newest run in the average rate of a width


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of forward passes."""

    passes: int | None  # at most; None for no limit
    width_index: int | None = None  # the fixed width; None for the adaptive program
    forced: int = UNFORCED  # index of the width that every pass of the adaptive program must run
    is_timed: bool = True


class Scheduler:
    """See the module's docstring. One for each drafter and batch size; it keeps what it has learned."""

    def __init__(self, num_widths: int):
        """For a drafter with `num_widths` widths; the first one is the root alone."""
        self._root_runs = 0
        self._warm_up = list(range(num_widths))  # the first passes of a program are slow
        self._to_time = list(range(num_widths))
        self._pass_times = PassTimes(num_widths)
        self._rates = np.zeros(num_widths)  # tokens/s of fixed widths
        self._num_runs = 0

    def next(self, is_adaptive_ready: Callable[[], bool]) -> Run:
        """The next run. `is_adaptive_ready` starts the compilation of the adaptive program where needed."""
        root = self._pass_times.seconds[0]
        passes = int(np.clip(_TIMING_SECONDS / root, 1, _MAX_TIMED_PASSES))
        if self._root_runs < 2:
            return Run(passes, width_index=0)
        if self.has_long_passes:
            if not is_adaptive_ready():
                return Run(int(np.ceil(_WAIT_SECONDS / root)), width_index=0, is_timed=False)  # slower than usual
            to_run = self._warm_up or self._to_time
            return Run(passes, forced=to_run[0]) if to_run else Run(None)
        index, seconds = self._next_fixed_width()
        return Run(int(np.ceil(seconds / root)), width_index=index)

    def record(self, run: Run, counts: np.ndarray, tokens: int, seconds: float) -> None:
        """Records that a run took `seconds` for `counts` passes over each width, int [n], and emitted `tokens`."""
        if not run.is_timed or not counts.any():
            return
        if run.forced != UNFORCED and self._warm_up:
            self._warm_up.pop(0)
            return
        self._pass_times.observe(counts, seconds)
        if self._root_runs < 2:
            self._root_runs += 1
        elif run.forced != UNFORCED:
            self._to_time.pop(0)
        elif run.width_index is not None:
            rate, old = tokens / seconds, self._rates[run.width_index]
            self._rates[run.width_index] = rate if old == 0 else _NEWEST * rate + (1 - _NEWEST) * old
            self._num_runs += 1

    @property
    def has_long_passes(self) -> bool:
        """Whether the policy is worth its cost."""
        return self._pass_times.seconds[0] >= _LONG_PASS

    def relative_time(self) -> np.ndarray | None:
        """float32 [n]: the time of a pass of each width, in units of the root alone; None before all are timed."""
        return None if self._to_time else self._pass_times.relative()

    def _next_fixed_width(self) -> tuple[int, float]:
        """Index of the next width, 0 or 1, and the seconds that its run may take with passes over the root alone."""
        for index in (0, 1):
            if not self._rates[index]:
                return index, _COMPARE_SECONDS
        best = int(self._rates[1] > self._rates[0])
        interval = _COMPARE_FIRST if self._num_runs < _COMPARE_EVERY else _COMPARE_EVERY
        return (1 - best, _COMPARE_SECONDS) if self._num_runs % interval == 0 else (best, _RUN_SECONDS)
