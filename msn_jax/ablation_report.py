"""The report of an ablation: means over seeds, as JSON, as a table, and as a plot of speed against quality."""

import itertools
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from msn_jax import environment
from msn_jax.ablation import Ablation
from msn_jax.evals.statistics import mean, with_error

_MARKERS = "osD^vP*Xp<>h"


def build(grid: Ablation, runs: Sequence[dict]) -> dict:
    """The content of report.json, from the finished runs."""
    head = {**environment.environment(), "ablation": grid.name, "factors": list(grid.factors)}
    return {**head, "runs": list(runs), "rows": rows(runs)}


def rows(runs: Sequence[dict]) -> list[dict]:
    """One row per setting and decoding: means over its runs, and standard errors, null for one run."""
    result = []
    for setting in _distinct(run["setting"] for run in runs):
        of_setting = [run for run in runs if run["setting"] == setting]
        losses = [run["clean_loss"] for run in of_setting]
        loss = (None, None) if None in losses else mean(losses)
        for decodings in zip(*(run["decoding"] for run in of_setting), strict=True):
            first = decodings[0]
            row = {**setting, "decoder": first["decoder"], "tree": first["tree"], "seeds": len(of_setting)}
            accepted = mean([one["mean_accepted_tokens"] for one in decodings])
            row |= with_error("clean_loss", loss) | with_error("mean_accepted_tokens", accepted)
            row |= {name: mean([one[name] for one in decodings])[0] for name in ("exact_share", "repeated_4_grams")}
            result.append(row)
    return result


def one_line(run: dict) -> str:
    """What a run found."""
    loss = [] if run["clean_loss"] is None else [f"clean loss {run['clean_loss']:.3f}"]
    found = [f"{_series(one)} {one['mean_accepted_tokens']:.2f}" for one in run["decoding"]]
    return ", ".join([*loss, *found])


def to_table(report: dict) -> Table:
    """The rows for the terminal; values that rest on several seeds with their standard errors."""
    factors = report["factors"]
    table = Table(title=f"{report['ablation']}: means over seeds ± standard error")
    for name in (*factors, "decoder", "tree"):
        table.add_column(name)
    for name in ("seeds", "clean loss", "tokens a pass", "exact", "repeated 4-grams"):
        table.add_column(name, justify="right")
    for row, following in itertools.zip_longest(report["rows"], report["rows"][1:]):
        is_last = following is None or any(row[name] != following[name] for name in factors)
        table.add_row(
            *(str(row[name]) for name in factors),
            row["decoder"],
            row["tree"] or "default",
            str(row["seeds"]),
            _with_error(row["clean_loss"], row["clean_loss_stderr"], 3),
            _with_error(row["mean_accepted_tokens"], row["mean_accepted_tokens_stderr"], 2),
            f"{row['exact_share']:.1%}",
            f"{row['repeated_4_grams']:.0%}",
            end_section=is_last,
        )
    return table


def draw(report: dict, path: Path) -> None:
    """Plots mean accepted tokens against clean loss: a colour per decoding, a marker per setting.

    Without training, settings are side by side instead. Error bars are standard errors over seeds.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.lines import Line2D

    factors, points = report["factors"], report["rows"]
    settings = _distinct([row[name] for name in factors] for row in points)
    series = list(dict.fromkeys(map(_series, points)))
    is_trained = all(row["clean_loss"] is not None for row in points)
    figure, axes = pyplot.subplots(figsize=(10, 6), layout="constrained")
    colours = pyplot.get_cmap("tab10").colors
    for row in points:
        setting = settings.index([row[name] for name in factors])
        axes.errorbar(
            row["clean_loss"] if is_trained else setting,
            row["mean_accepted_tokens"],
            xerr=row["clean_loss_stderr"],
            yerr=row["mean_accepted_tokens_stderr"],
            color=colours[series.index(_series(row)) % len(colours)],
            marker=_MARKERS[setting % len(_MARKERS)],
            markersize=7,
            capsize=3,
            linestyle="",
        )
    names = [", ".join(map(str, setting)) for setting in settings]
    lines = [
        Line2D([], [], ls="", marker="s", color=colours[i % len(colours)], label=name) for i, name in enumerate(series)
    ]
    axes.set(ylabel="mean accepted tokens", title=report["ablation"])
    if is_trained:
        axes.set_xlabel("clean loss on held-out data, nats per token")
        lines += [
            Line2D([], [], ls="", marker=_MARKERS[i % len(_MARKERS)], color="#666666", label=name)
            for i, name in enumerate(names)
        ]
    else:
        axes.set_xlabel(", ".join(factors))
        axes.set_xticks(range(len(names)), names)
    axes.grid(alpha=0.3)
    axes.legend(handles=lines, loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def first_difference(theirs: object, ours: object, name: str = "") -> tuple[str, object, object] | None:
    """(name, value, value) of the first value in which two JSON values differ; None if they are equal."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        keys = list(theirs | ours)
        pairs = [(key, theirs.get(key), ours.get(key)) for key in keys]
    elif isinstance(theirs, list) and isinstance(ours, list) and len(theirs) == len(ours):
        pairs = [(str(i), *pair) for i, pair in enumerate(zip(theirs, ours, strict=True))]
    elif isinstance(theirs, list) and isinstance(ours, list):
        return f"{name} (number)", len(theirs), len(ours)
    else:
        return None if theirs == ours else (name, theirs, ours)
    differences = (first_difference(there, here, f"{name}.{key}".lstrip(".")) for key, there, here in pairs)
    return next((difference for difference in differences if difference is not None), None)


def _series(row: dict) -> str:
    return row["decoder"] + (f", {row['tree']}" if row["tree"] else "")


def _with_error(value: float | None, error: float | None, digits: int) -> str:
    if value is None:
        return "-"
    return f"{value:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def _distinct(values: object) -> list:
    """The values, which need not be hashable, without repetitions."""
    result: list = []
    for value in values:
        if value not in result:
            result.append(value)
    return result
