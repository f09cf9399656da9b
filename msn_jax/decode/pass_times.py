"""How long a forward pass over each width takes, estimated from runs that mix widths."""

import numpy as np

_NOISE = 0.03  # standard deviation of the time of a long run, relative to it
_NOISE_OF_ONE = 0.2  # in addition: of the time of a single pass
_DRIFT = 0.005  # standard deviation by which the time of a pass changes from one pass to the next
_UNKNOWN = 2.0  # standard deviation of a width that has not run, relative to the root alone
_SHORTEST = 0.5  # no time is taken to be shorter than this part of its estimate
_OUTLIER = 3.0  # standard deviations; a larger error counts as this one


class PassTimes:
    """A Kalman filter: a run of c_w passes over each width w that took T seconds says that T = sum of c_w t_w."""

    def __init__(self, num_widths: int):
        """For `num_widths` widths, the first of which is the root alone; nothing is known yet."""
        self.seconds = np.full(num_widths, np.inf)
        self._covariance = np.zeros((num_widths, num_widths))

    def observe(self, counts: np.ndarray, seconds: float) -> None:
        """Takes note of a run of `counts` passes over each width, int [n]; the first run is of the root alone."""
        if np.isinf(self.seconds[0]):
            root = seconds / counts[0]
            self.seconds[:] = root
            self._covariance = np.diag((np.where(counts > 0, _NOISE_OF_ONE, _UNKNOWN) * root) ** 2)
            return
        self._covariance += counts.sum() * np.diag((_DRIFT * self.seconds) ** 2)
        expected = counts * self.seconds
        noise = (_NOISE * expected.sum()) ** 2 + _NOISE_OF_ONE**2 * (expected @ self.seconds)
        variance = counts @ self._covariance @ counts + noise
        gain = self._covariance @ counts / variance
        limit = _OUTLIER * np.sqrt(variance)
        self.seconds += gain * np.clip(seconds - expected.sum(), -limit, limit)
        self._covariance -= np.outer(gain, counts @ self._covariance)

    def relative(self) -> np.ndarray:
        """float32 [n]: in units of the root alone. A pass over more nodes is never taken to be faster.

        All times are taken to be one standard deviation shorter than their estimates, so that a width that seems slow
        is tried again after a while.
        """
        shortest = np.maximum(self.seconds - np.sqrt(np.diag(self._covariance)), _SHORTEST * self.seconds)
        return np.maximum.accumulate(shortest / shortest[0]).astype(np.float32)
