"""Means with standard errors over questions, and repetition in a text."""

import math
from collections.abc import Sequence

import numpy as np


def by_group(samples: Sequence[dict]) -> dict[str, list[dict]]:
    """The samples of every group, by field 'group', and if there are several, of 'all' together."""
    groups: dict[str, list[dict]] = {}
    for sample in samples:
        groups.setdefault(sample["group"], []).append(sample)
    return groups | ({"all": list(samples)} if len(groups) > 1 else {})


def mean(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean of one value per question and its standard error, which one question alone does not have."""
    array = np.asarray(values, np.float64)
    error = float(array.std(ddof=1)) / math.sqrt(len(array)) if len(array) > 1 else None
    return float(array.mean()), error


def ratio_of_means(values: Sequence[float], baseline: Sequence[float]) -> tuple[float, float | None]:
    """The ratio of the means of paired values, and its standard error (delta method).

    Args:
      values: one per question.
      baseline: of the same questions, with a positive mean.
    """
    x, y = np.asarray(values, np.float64), np.asarray(baseline, np.float64)
    ratio = float(x.mean() / y.mean())
    error = float((x - ratio * y).std(ddof=1) / y.mean()) / math.sqrt(len(x)) if len(x) > 1 else None
    return ratio, error


def with_error(name: str, estimate: tuple[float, float | None]) -> dict:
    """Two fields of a row: `name` and `name_stderr`."""
    return {name: estimate[0], f"{name}_stderr": estimate[1]}


def repeated_4_grams(tokens: Sequence[int]) -> float:
    """The share of 4-grams that occurred before in the sequence."""
    grams = [tuple(tokens[i : i + 4]) for i in range(len(tokens) - 3)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
