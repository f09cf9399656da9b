"""Shared by the benchmarks: runs in alternating order, tables, and reports that record their environment."""

import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from msn_jax.cli import InputError
from msn_jax.environment import environment

__all__ = ["ROOT", "alternate", "environment", "parse_integers", "print_table", "write"]

ROOT = Path(__file__).parents[1]


def alternate(runs: Mapping[object, Callable[[], float]], repeats: int) -> dict[object, float]:
    """The median of `repeats` measurements of every run.

    The runs alternate, in forward and reverse order, so that other load on the machine affects all of them equally.
    """
    measured: dict[object, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for repeat in range(repeats):
        for name in names if repeat % 2 == 0 else reversed(names):
            measured[name].append(runs[name]())
    return {name: statistics.median(values) for name, values in measured.items()}


def print_table(title: str, rows: Sequence[Mapping[str, object]], columns: Sequence[str]) -> None:
    """Prints columns of the rows as a table to standard error (standard output is for JSON), with seconds in ms."""
    if not rows:
        return
    table = Table(*(name.replace("seconds", "ms").replace("_", " ") for name in columns), title=title)
    for row in rows:
        units = (1000 if name.endswith("seconds") else 1 for name in columns)
        table.add_row(*map(_cell, (row.get(name) for name in columns), units))
    Console(stderr=True, width=None if sys.stderr.isatty() else 160).print(table)


def _cell(value: object, unit: int) -> str:
    if value is None:
        return "-"
    return f"{value * unit:.4g}" if isinstance(value, float) else str(value)


def parse_integers(flag: str, items: list[str]) -> list[int]:
    """The different values of a list flag, sorted. InputError unless all are integers above 0."""
    given = f"{flag}={','.join(items)}"
    try:
        values = [int(item) for item in items]
    except ValueError as error:
        raise InputError(f"{given}: must be comma-separated integers") from error
    if not values or min(values) < 1:
        raise InputError(f"{given}: every value must be at least 1")
    return sorted(set(values))


def write(report: dict, output: str) -> None:
    """Writes the report as JSON to a file, or to standard output if `output` is empty."""
    text = json.dumps(report, indent=2)
    if not output:
        print(text)
        return
    try:
        Path(output).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"--output={output}: cannot write: {error.strerror}") from error
