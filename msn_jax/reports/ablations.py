"""Sections about runs of ablate."""

from collections.abc import Mapping, Sequence

from msn_jax.reports import plots, section, tables
from msn_jax.reports.plots import Point, Spot
from msn_jax.reports.section import ERROR_BARS, Highlight, Section
from msn_jax.reports.sources import Source, number


def build(source: Source) -> Section:
    """The section of a run."""
    report = source.report
    rows, factors, runs = report["rows"], report["factors"], report["runs"]
    spots: dict[str, list[Spot]] = {}
    points: dict[str, list[Point]] = {}
    for row in rows:
        series, setting = _series(row), _setting(row, factors)
        y, y_error = number(row, "mean_accepted_tokens"), number(row, "mean_accepted_tokens_stderr")
        x, x_error = number(row, "clean_loss"), number(row, "clean_loss_stderr")
        if y is not None:
            points.setdefault(series, []).append(Point(setting, y, y_error))
        if x is not None and y is not None:
            spots.setdefault(series, []).append(Spot(setting, x, y, x_error, y_error))
    drawn = section.front(spots)
    if points:
        title = "Mean accepted tokens by setting"
        drawn.append(plots.dots(title, points, "tokens per forward pass", ERROR_BARS, 1.0))
    drawn += section.accuracy_by_offset(_noise_accuracies(runs, factors), "; means over the seeds")
    all_runs = [{**run["setting"], "seed": run.get("seed"), "clean_loss": run.get("clean_loss")} for run in runs]
    return Section(
        kind="ablate",
        title=f"Ablation: {report['ablation']}",
        subtitle=f"by {', '.join(map(tables.label, factors))}" if factors else "",
        highlights=_highlights(rows, runs, factors),
        tables=[tables.of_rows("Results", rows, "Means over the seeds, ± one standard error.")],
        plots=drawn,
        answers=[],
        measured=section.measured(source),
        details=[tables.of_rows("Runs", all_runs)],
    )


def _highlights(rows: Sequence[dict], runs: Sequence[dict], factors: Sequence[str]) -> list[Highlight]:
    seeds = {run.get("seed") for run in runs}
    result = [Highlight(f"{len(runs):,}", f"runs, {len(seeds)} seed{'s' * (len(seeds) != 1)}")]
    accepted = [row for row in rows if number(row, "mean_accepted_tokens") is not None]
    if accepted:
        best = max(accepted, key=lambda row: number(row, "mean_accepted_tokens"))
        result += section.highlight(
            best, "mean_accepted_tokens", f"at most: {_setting(best, factors)}, {_series(best)}"
        )
    losses = [row for row in rows if number(row, "clean_loss") is not None]
    if losses:
        lowest = min(losses, key=lambda row: number(row, "clean_loss"))
        result += section.highlight(lowest, "clean_loss", f"at least: {_setting(lowest, factors)}")
    return result


def _noise_accuracies(runs: Sequence[dict], factors: Sequence[str]) -> dict[str, list[float | None]]:
    """Mean accuracy by offset of each setting."""
    settings: dict[str, list[list[float | None]]] = {}
    for run in runs:
        if run.get("noise_accuracy"):
            of_setting = settings.setdefault(_setting(run["setting"], factors), [])
            of_setting.append(section.numbers(run["noise_accuracy"]))
    result: dict[str, list[float | None]] = {}
    for setting, lists in settings.items():
        by_offset = [[one[i] for one in lists if i < len(one)] for i in range(max(map(len, lists)))]
        known = [[value for value in values if value is not None] for values in by_offset]
        result[setting] = [sum(values) / len(values) if values else None for values in known]
    return result


def _series(row: Mapping) -> str:
    return f"{row.get('decoder')}" + (f", {row['tree']}" if row.get("tree") else "")


def _setting(values: Mapping, factors: Sequence[str]) -> str:
    """The values of the factors; texts stand for themselves."""
    found = {factor: values[factor] for factor in factors if factor in values}
    named = (value if isinstance(value, str) else f"{tables.label(name)} {value}" for name, value in found.items())
    return ", ".join(named) or "one setting"
