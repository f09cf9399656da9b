"""Pearson's chi-square statistic, for tests of random draws."""

import numpy as np
from numpy.typing import ArrayLike


def statistic(counts: ArrayLike, probabilities: ArrayLike) -> float:
    """Sum of (observed - expected)^2 / expected; outcomes of probability 0 must not have been observed."""
    counts, probabilities = np.asarray(counts), np.asarray(probabilities)
    possible = probabilities > 0
    assert counts[~possible].sum() == 0
    expected = probabilities[possible] * counts.sum()
    return ((counts[possible] - expected) ** 2 / expected).sum()


def z_score(counts: ArrayLike, probabilities: ArrayLike) -> float:
    """Distance of the statistic from its mean under the null hypothesis, in standard deviations."""
    degrees = np.count_nonzero(probabilities) - 1
    return (statistic(counts, probabilities) - degrees) / np.sqrt(2 * degrees)
