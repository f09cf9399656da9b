"""Shared by the benchmarks: runs in alternating order, tables, and reports that record their environment."""

import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import jaxlib
from rich.console import Console
from rich.table import Table

from msn_jax.cli import InputError, processor

ROOT = Path(__file__).parents[1]


def environment(**versions: str) -> dict:
    """Hardware, versions, commit and command, recorded in every report. `versions` adds versions of other packages."""
    device, cores = jax.devices()[0], len(os.sched_getaffinity(0))
    own_versions = {"python": platform.python_version(), "jax": jax.__version__, "jaxlib": jaxlib.__version__}
    return {
        "hardware": f"{jax.device_count()} x {device.device_kind}, {cores} CPU cores, {processor()}",
        "load_average": os.getloadavg()[0],  # over the last minute, in processes
        "versions": own_versions | versions,
        "commit": _commit(),
        "command": " ".join(["python -m", *_module_and_flags()]),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }


def _commit() -> str | None:
    """The commit of this checkout, followed by '+' if tracked files differ from it; None outside a checkout."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _module_and_flags() -> list[str]:
    path = Path(sys.argv[0]).resolve()
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts) if path.is_relative_to(ROOT) else path.name
    return [module, *sys.argv[1:]]


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
