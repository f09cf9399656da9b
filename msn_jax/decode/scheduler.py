"""Schedules the runs of an adaptive drafter: which compiled program decodes next, and for how many forward passes.

Every program continues from the same state, so the output does not depend on the schedule. There are two kinds:

    fixed       every forward pass runs the first w nodes of the tree, for one of the drafter's widths
    adaptive    the policy chooses the width of each pass (`adaptive.py`), at a small cost per pass

First the root alone is timed. If its passes are long, the policy is worth its cost: after a few timed passes of every
width, the adaptive program decodes everything else. The root alone decodes until that program is compiled. If the
passes are short, the policy's cost would matter, and runs of the root alone and of a few nodes alternate instead:
mostly the faster one, measured in tokens per second.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from msn_jax.decode.adaptive import UNFORCED

_LONG_PASS = 0.002  # seconds
_TIMING_ROUNDS = 2
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
        self._to_time = [index for _ in range(_TIMING_ROUNDS) for index in range(num_widths)]
        self._pass_seconds = np.full(num_widths, np.inf)  # the shortest time of each width
        self._rates = np.zeros(num_widths)  # tokens/s of fixed widths
        self._num_runs = 0

    def next(self, is_adaptive_compiled: Callable[[], bool]) -> Run:
        """The next run. `is_adaptive_compiled` starts the compilation of the adaptive program where needed."""
        passes = int(np.clip(_TIMING_SECONDS / self._pass_seconds[0], 1, _MAX_TIMED_PASSES))
        if self._root_runs < 2:
            return Run(passes, width_index=0)
        if self.has_long_passes:
            if not is_adaptive_compiled():
                return Run(int(np.ceil(_WAIT_SECONDS / self._pass_seconds[0])), width_index=0)
            return Run(passes, forced=self._to_time[0]) if self._to_time else Run(None, is_timed=False)
        index, seconds = self._next_fixed_width()
        return Run(int(np.ceil(seconds / self._pass_seconds[0])), width_index=index)

    def record(self, run: Run, passes: int, tokens: int, seconds: float) -> None:
        """Records that a timed run took `seconds` for `passes` forward passes, which emitted `tokens` in all rows."""
        if passes == 0:
            return
        index = run.forced if run.width_index is None else run.width_index
        self._pass_seconds[index] = min(self._pass_seconds[index], seconds / passes)
        if self._root_runs < 2:
            self._root_runs += 1
        elif run.width_index is None:
            self._to_time.pop(0)
        else:
            rate, old = tokens / seconds, self._rates[index]
            self._rates[index] = rate if old == 0 else _NEWEST * rate + (1 - _NEWEST) * old
            self._num_runs += 1

    @property
    def has_long_passes(self) -> bool:
        """Whether the policy is worth its cost."""
        return self._pass_seconds[0] >= _LONG_PASS

    def relative_time(self) -> np.ndarray | None:
        """float32 [n]: the time of a pass of each width, in units of the root alone; None before all are timed.

        A pass over more nodes is never taken to be faster.
        """
        if self._to_time:
            return None
        return np.maximum.accumulate(self._pass_seconds / self._pass_seconds[0]).astype(np.float32)

    def _next_fixed_width(self) -> tuple[int, float]:
        """Index of the next width, 0 or 1, and the seconds that its run may take with passes over the root alone."""
        for index in (0, 1):
            if not self._rates[index]:
                return index, _COMPARE_SECONDS
        best = int(self._rates[1] > self._rates[0])
        interval = _COMPARE_FIRST if self._num_runs < _COMPARE_EVERY else _COMPARE_EVERY
        return (1 - best, _COMPARE_SECONDS) if self._num_runs % interval == 0 else (best, _RUN_SECONDS)
