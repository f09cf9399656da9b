"""Schedules the runs of an adaptive drafter: which compiled program decodes next, and for how many forward passes.

Every program continues from the same state, so the output does not depend on the schedule. There are two kinds:

    fixed       every forward pass runs the first w nodes of the tree, for one of the drafter's widths
    adaptive    the policy chooses the width of each pass (`adaptive.py`), at a small cost per pass

First the root alone is timed. If its passes are long, the policy is worth its cost, and the adaptive program decodes.
Its widths are timed in rounds: one run of each width right after the other, because the time of a pass grows with the
sequence and with the load of the machine, and only the ratios matter. The first round comes at once, and others from
time to time; the medians of the newest ones count. The first pass of a program over each width is slow, up to a third
of a second, so a new program begins with a round that does not count. Until nothing is being compiled, the root alone
decodes.

If the passes are short, the policy's cost would matter, and runs of the root alone or of a few nodes decode instead:
whichever emits more tokens per second. From time to time, a short run of each is timed. The other runs are not, because
the host would have to wait for the prefill before it could start the clock.
"""

import collections
import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from msn_jax.decode.adaptive import UNFORCED

_LONG_PASS = 0.002  # seconds
_WAIT_SECONDS = 0.1  # of one run while something is being compiled
_ROUNDS_AT = (0, 64, 256)  # passes of the adaptive program before each of the first timing rounds,
_ROUNDS_EVERY = 512  # and passes between later ones
_NEWEST_ROUNDS = 5
_PRIOR_NODE_TIME = 0.15  # of a further node, relative to the root alone, before the first round
_TIMING_SECONDS = 0.003  # of one timed run
_RUN_SECONDS = 0.02  # of an untimed run of a fixed width; reading its result takes about 0.2 ms
_COMPARE_EVERY = 24  # untimed runs before the next comparison,
_COMPARE_SECONDS = 0.006  # which times one run of each width as long as this
_FIRST_COMPARISONS = 4  # in a row, because single measurements depend on the text
_KEPT = 0.9  # of the tokens and seconds of a width per further timed run: the last 10 or so count


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of forward passes."""

    passes: int  # at most
    width_index: int | None = None  # the fixed width; None for the adaptive program
    forced: int = UNFORCED  # index of the width that every pass of the adaptive program must run
    is_timed: bool = True  # of a fixed width: whether it counts


class TimingRounds:
    """The time of a pass over each width, relative to the root alone."""

    def __init__(self, widths: Sequence[int]):
        """For passes over these numbers of nodes; the first one is 1. No round is complete."""
        self._prior = 1 + _PRIOR_NODE_TIME * (np.array(widths) - 1)
        self._current: list[float] = []  # seconds of a pass over each width that was timed in this round
        self._newest: collections.deque[list[float]] = collections.deque(maxlen=_NEWEST_ROUNDS)
        self._next_at = _ROUNDS_AT[0]  # the number of passes at which the next round begins
        self._later = iter(_ROUNDS_AT[1:])
        self._num_passes = 0  # of the adaptive program outside of rounds
        self._is_warm_up = False

    def warm_up(self) -> None:
        """Inserts a round that does not count."""
        self._current, self._is_warm_up = [], True

    def restart(self) -> None:
        """Begins an unfinished round again, because another sequence or program is next."""
        self._current = []

    def passes_left(self) -> int:
        """Passes before the next round; 0 in a round."""
        return 0 if self._is_warm_up else max(self._next_at - self._num_passes, 0)

    def next_width(self) -> int:
        """Index of the width to time next."""
        return len(self._current)

    def record_timed(self, seconds: float) -> None:
        """Records the time of a pass over `next_width`."""
        self._current.append(seconds)
        if len(self._current) == len(self._prior):
            if not self._is_warm_up:
                self._newest.append(self._current)
                self._next_at = next(self._later, self._next_at + _ROUNDS_EVERY)
            self._current, self._is_warm_up = [], False

    def record_untimed(self, passes: int) -> None:
        """Records passes of the adaptive program outside of rounds."""
        self._num_passes += passes

    def relative_time(self) -> np.ndarray:
        """float32 [n]: the medians of the newest rounds. A pass over more nodes is never taken to be faster."""
        rounds = np.array(self._newest or [self._prior])
        return np.maximum.accumulate(np.median(rounds / rounds[:, :1], axis=0)).astype(np.float32)


class Scheduler:
    """See the module's docstring. One for each drafter and batch size; it keeps what it has learned."""

    def __init__(self, widths: Sequence[int]):
        """For a drafter with these widths; the first one is the root alone."""
        self.rounds = TimingRounds(widths)
        self._root_runs = 0  # timed runs of the root alone
        self._root_seconds = np.inf  # of a pass over the root alone, the shortest of all
        self._tokens = np.zeros(len(widths))  # of fixed widths, decayed
        self._seconds = np.zeros(len(widths))
        self._timed_runs = 0  # of fixed widths
        self._untimed_runs = 0  # since the last comparison

    def next(self, is_adaptive_ready: Callable[[], bool]) -> Run:
        """The next run. `is_adaptive_ready` starts the compilation of the adaptive program where needed."""
        if self._root_runs < 2:
            return Run(self._passes_in(_TIMING_SECONDS), width_index=0)
        if not self.has_long_passes:
            return self._next_fixed_width()
        if not is_adaptive_ready():
            return Run(self._passes_in(_WAIT_SECONDS), width_index=0, is_timed=False)
        if passes := self.rounds.passes_left():
            return Run(passes)
        return Run(self._passes_in(_TIMING_SECONDS), forced=self.rounds.next_width())

    def record(self, run: Run, passes: int, tokens: int, seconds: float) -> None:
        """Records that a run took `seconds` for `passes` forward passes.

        They emitted `tokens` in all rows, if the run is timed.
        """
        if passes == 0:
            return
        if 0 in (run.width_index, run.forced):
            self._root_seconds = min(self._root_seconds, seconds / passes)
        if run.forced != UNFORCED:
            self.rounds.record_timed(seconds / passes)
        elif run.width_index is None:
            self.rounds.record_untimed(passes)
        elif run.is_timed:
            self._root_runs += run.width_index == 0
            if self._root_runs > 2:  # the first two runs only tell how long a pass takes
                self._timed_runs, self._untimed_runs = self._timed_runs + 1, 0
                for total, new in ((self._tokens, tokens), (self._seconds, seconds)):
                    total[run.width_index] = _KEPT * total[run.width_index] + new
        else:
            self._untimed_runs += 1

    @property
    def has_long_passes(self) -> bool:
        """Whether the policy is worth its cost."""
        return self._root_seconds >= _LONG_PASS

    def _passes_in(self, seconds: float) -> int:
        """Passes over the root alone that take so long, at least one."""
        return max(int(np.ceil(seconds / self._root_seconds)), 1)

    def _next_fixed_width(self) -> Run:
        """The next run of the root alone or of a few nodes."""
        is_comparing = self._timed_runs < 2 * _FIRST_COMPARISONS or self._timed_runs % 2 == 1
        if is_comparing or self._untimed_runs >= _COMPARE_EVERY:
            return Run(self._passes_in(_COMPARE_SECONDS), width_index=self._timed_runs % 2)
        faster = int(self._tokens[1] * self._seconds[0] > self._tokens[0] * self._seconds[1])
        return Run(self._passes_in(_RUN_SECONDS), width_index=faster, is_timed=False)
