"""A section of the page, and what sections of several kinds share."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from msn_jax.reports import plots, tables
from msn_jax.reports.answers import Answer
from msn_jax.reports.plots import Plot, Point, Spot
from msn_jax.reports.sources import Source, number
from msn_jax.reports.tables import Table

REFERENCE = "autoregressive"
ERROR_BARS = "Bars are standard errors."


class Highlight(NamedTuple):
    """A figure at the top of a section."""

    value: str
    about: str
    error: str = ""  # standard error


@dataclasses.dataclass(frozen=True)
class Section:
    """A run on the page."""

    kind: str
    title: str
    subtitle: str
    highlights: list[Highlight]
    tables: list[Table]
    plots: list[Plot]
    answers: list[Answer]
    measured: list[tuple[str, str]]  # (what, value): how it was measured
    details: list[Table]  # folded, at the end


def highlight(row: Mapping, field: str, about: str = "") -> list[Highlight]:
    """The value of a field, if the row has one. `about` says of what it is."""
    if number(row, field) is None:
        return []
    cell = tables.cell(row, field)
    return [Highlight(cell.text, ", ".join(filter(None, (tables.label(field), about))), cell.error)]


def by_group(
    rows: Sequence[Mapping], group: str | None, field: str, title: str, xlabel: str, reference: float | None = None
) -> list[Plot]:
    """A plot of a field by group and decoder; none where the rows have no groups, or no values."""
    series: dict[str, list[Point]] = {}
    for row in rows:
        value = number(row, field)
        if group is not None and value is not None and "decoder" in row and row["decoder"] != REFERENCE:
            point = Point(str(row.get(group)), value, number(row, f"{field}_stderr"))
            series.setdefault(str(row["decoder"]), []).append(point)
    note = ERROR_BARS if any(point.error for points in series.values() for point in points) else ""
    return [plots.dots(title, series, xlabel, note, reference)] if series else []


def front(spots: Mapping[str, list[Spot]]) -> list[Plot]:
    """The plot of mean accepted tokens against clean loss; none without points."""
    note = "Up and to the left is better; the dashed line joins the points that no other point beats. "
    if any(spot.x_error or spot.y_error for of_series in spots.values() for spot in of_series):
        note += ERROR_BARS
    labels = ("clean loss, nats per token", "mean accepted tokens")
    return [plots.front("Mean accepted tokens against clean loss", spots, *labels, note)] if spots else []


def accuracy_by_offset(accuracies: Mapping[str, list[float | None]], note: str = "") -> list[Plot]:
    """The plot of draft accuracies; none without values."""
    series = {name: (values, index) for index, (name, values) in enumerate(accuracies.items()) if values}
    words = "Share of correct predictions at noise positions, by distance from the clean text" + note + "."
    return [plots.lines("Draft accuracy by offset", series, "offset", words)] if series else []


def numbers(values: Sequence) -> list[float | None]:
    """The finite numbers of a list; None for anything else."""
    return [number({"value": value}, "value") for value in values]


def model_name(model: str, models: Sequence[str] = ()) -> str:
    """The last part of a model's path, if it is unique among `models`."""
    name = Path(model).name or model
    return model if sum((Path(other).name or other) == name for other in models) > 1 else name


def measured(source: Source, settings: Mapping | None = None) -> list[tuple[str, str]]:
    """How the figures came about."""
    report = source.report
    versions = dict(report.get("versions") or {})
    commit = report.get("commit") or versions.pop("commit", None)
    load = number(report, "load_average")
    shown = {
        "command": report.get("command"),
        "model": report.get("model"),
        "adapter": report.get("adapter"),
        "dtype": report.get("dtype"),
        "settings": ", ".join(f"{name}={value}" for name, value in (settings or {}).items() if value is not None),
        "hardware": report.get("hardware"),
        "load average": None if load is None else f"{load:.2f}",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "commit": commit,
        "date": report.get("date"),
    }
    return [(name, str(value)) for name, value in shown.items() if value]
