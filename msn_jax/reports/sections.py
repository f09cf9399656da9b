"""Sections of a page: one per run, and the first table of a page with several evaluations."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from msn_jax.reports import plots, tables
from msn_jax.reports.answers import Answer, choose
from msn_jax.reports.plots import Plot, Point, Spot
from msn_jax.reports.sources import Source, number
from msn_jax.reports.tables import Cell, Table

_REFERENCE = "autoregressive"
_ERROR_BARS = "Bars are standard errors."
_SUITES = {
    "gsm8k": "GSM8K",
    "human_eval": "HumanEval",
    "mbpp": "MBPP",
    "mmlu": "MMLU",
    "mt_bench": "MT-bench",
    "spec_bench": "Spec-Bench",
}
_SCORES = ("strict_match", "flexible_match", "accuracy", "pass@1", "pass@10", "pass@100")
_GROUPS = ("group", "category", "subject")
_FOLDED = 20  # rows of a table that is folded


@dataclasses.dataclass(frozen=True)
class Section:
    """A run on the page."""

    kind: str
    title: str
    subtitle: str
    highlights: list[tuple[str, str]]  # (value, what it is)
    tables: list[Table]
    plots: list[Plot]
    answers: list[Answer]
    measured: list[tuple[str, str]]  # (what, value): how it was measured
    details: list[Table] = dataclasses.field(default_factory=list)  # folded, at the end


def build(source: Source) -> Section:
    """The section of a run."""
    return {"evaluate": _evaluate, "ablate": _ablate, "calibrate": _calibrate, "demo": _demo}[source.kind](source)


def speed_beside_quality(sources: Sequence[Source]) -> Table | None:
    """Models by scores of suites, next to speedup and mean accepted tokens; None for fewer than two evaluations.

    Of several runs of a model on a suite, the one with the most questions counts.
    """
    runs: dict[tuple[str, str], dict] = {}
    for source in sources:
        if source.kind == "evaluate":
            key = (source.report["model"], source.report["suite"])
            if key not in runs or runs[key]["questions"] < source.report["questions"]:
                runs[key] = source.report
    models = list(dict.fromkeys(model for model, _ in runs))
    if len(runs) < 2:
        return None
    by_model: dict[str, dict[str, Cell]] = {model: {} for model in models}
    for (model, suite), report in runs.items():
        whole = _over_all_groups(report["rows"])
        note = f"{report['questions']:,} of {report['of']:,}"
        name = _SUITES.get(suite, suite)
        for score in _SCORES:
            row = next((row for row in whole if number(row, score) is not None), None)
            if row is not None:
                by_model[model][f"{name} {tables.label(score)}"] = tables.cell(row, score, note)
        fastest = _fastest(whole)
        if suite == "spec_bench" and fastest is not None:
            about = f"{fastest.get('decoder')}, {note}"
            by_model[model]["speedup"] = tables.cell(fastest, "speedup", about)
            by_model[model]["mean accepted tokens"] = tables.cell(fastest, "mean_accepted_tokens", about)
    names = list(dict.fromkeys(name for cells in by_model.values() for name in cells))
    speeds = [name for name in ("speedup", "mean accepted tokens") if name in names]
    names = [name for name in names if name not in speeds] + speeds
    rows = [
        [Cell(_name(model, models)), *(cells.get(name, Cell("–")) for name in names)]
        for model, cells in by_model.items()
    ]
    note = "± one standard error. Below a value: how many of the suite's questions it is from."
    if speeds:
        note += " Speed is that of the fastest decoder on Spec-Bench, relative to autoregressive decoding of the model."
    return Table("Speed beside quality", ["model", *names], rows, note)


def _evaluate(source: Source) -> Section:
    report, suite = source.report, source.report["suite"]
    rows = report["rows"]
    whole = _over_all_groups(rows)
    name = _SUITES.get(suite, suite)
    highlights, drawn = [], []
    fastest = _fastest(whole) or (whole[-1] if whole else {})
    for field in (*_SCORES, "speedup", "mean_accepted_tokens", "exact"):
        if number(fastest, field) is not None:
            value = tables.cell(fastest, field)
            error = f" ± {value.error}" if value.error else ""
            of = f", {fastest['decoder']}" if "decoder" in fastest else ""
            highlights.append((value.text, f"{tables.label(field)}{error}{of}"))
    drawn += _by_group(rows, "speedup", "Speedup by group", "speedup over autoregressive decoding", 1.0)
    drawn += _by_group(rows, "mean_accepted_tokens", "Mean accepted tokens by group", "tokens per forward pass", None)
    lengths = _accepted_lengths(source.samples)
    if lengths:
        note = "How many tokens a forward pass emitted, over all answers."
        drawn.append(plots.histogram("Accepted lengths", lengths, note))
    is_long = len(rows) > _FOLDED
    table = tables.of_rows("Results", whole if is_long else rows, "± one standard error.")
    return Section(
        kind="evaluate",
        title=f"{name}, {_name(report['model'])}",
        subtitle=f"{report['questions']:,} of {report['of']:,} questions",
        highlights=highlights[:4],
        tables=[table],
        plots=drawn,
        answers=choose(source),
        measured=_measured(source, settings=report.get("settings") or {}),
        details=[tables.of_rows("All groups", rows)] if is_long else [],
    )


def _ablate(source: Source) -> Section:
    report = source.report
    rows, factors = report["rows"], report["factors"]
    drawn = []
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
    if spots:
        drawn.append(_front(spots))
    if points:
        title = "Mean accepted tokens by setting"
        drawn.append(plots.dots(title, points, "tokens per forward pass", _ERROR_BARS, 1.0))
    accuracies = _noise_accuracies(report["runs"], factors)
    if accuracies:
        note = "Share of correct predictions at noise positions, by distance from the clean text; means over the seeds."
        drawn.append(plots.lines("Draft accuracy by offset", accuracies, "offset", note))
    seeds = {run.get("seed") for run in report["runs"]}
    best = max(rows, key=lambda row: number(row, "mean_accepted_tokens") or 0.0, default=None)
    highlights = [(f"{len(report['runs']):,}", f"runs, {len(seeds)} seed{'s' * (len(seeds) != 1)}")]
    if best is not None and number(best, "mean_accepted_tokens") is not None:
        value = tables.show("mean_accepted_tokens", number(best, "mean_accepted_tokens"))
        highlights.append((value, f"most accepted tokens: {_setting(best, factors)}, {_series(best)}"))
    losses = [run for run in report["runs"] if number(run, "clean_loss") is not None]
    if losses:
        lowest = min(losses, key=lambda run: number(run, "clean_loss"))
        value = tables.show("clean_loss", number(lowest, "clean_loss"))
        highlights.append((value, f"lowest clean loss: {_setting(lowest['setting'], factors)}"))
    runs = [{**run["setting"], "seed": run.get("seed"), "clean_loss": run.get("clean_loss")} for run in report["runs"]]
    return Section(
        kind="ablate",
        title=f"Ablation: {report['ablation']}",
        subtitle=f"by {', '.join(factors)}" if factors else "",
        highlights=highlights,
        tables=[tables.of_rows("Results", rows, "Means over the seeds, ± one standard error.")],
        plots=drawn,
        answers=[],
        measured=_measured(source),
        details=[tables.of_rows("Runs", runs)],
    )


def _calibrate(source: Source) -> Section:
    report = source.report
    drawn = []
    accuracies = report.get("draft_accuracy") or []
    shown = _accuracy_lines(accuracies)
    if shown:
        note = "Share of positions at which a draft of this source is correct, whether or not the tree asks for it."
        drawn.append(plots.lines("Draft accuracy by depth and source", shown, "depth", note))
    parts = _acceptance(report["nodes"])
    if parts:
        note = "Share of forward passes that accept a node of this source at this depth, with the chosen tree."
        drawn.append(plots.stacks("Acceptance by depth and source", parts, "depth", note))
    widths = [row for row in report["widths"] if number(row, "width") is not None]
    for field, title, ylabel in (
        ("estimated_tokens_per_second", "Estimated speed by width", "tokens/s"),
        ("milliseconds", "Time of a forward pass by width", "ms"),
    ):
        values = [number(row, field) for row in widths]
        if len(widths) > 1 and any(value is not None for value in values):
            line = {"best tree of each width": (values, 0)}
            xs = [int(row["width"]) for row in widths]
            drawn.append(plots.lines(title, line, "nodes of the tree", "", xs, is_share=False, ylabel=ylabel))
    highlights = [(report["chosen"], "fastest tree")]
    rates = {str(row.get("tree")): number(row, "tokens_per_second") for row in report["benchmark"]}
    rate, reference = rates.get(report["chosen"]), rates.get(_REFERENCE)
    if rate is not None:
        highlights.append((tables.show("tokens_per_second", rate), "tokens/s, prefill included"))
        if reference:
            highlights.append((tables.show("speedup", rate / reference), "over the root alone"))
    names = list(dict.fromkeys(name for row in report["benchmark"] for name in row))
    depth = max((len(row["accuracy"]) for row in accuracies), default=0)
    accuracy_rows = [
        [
            Cell(row["source"]),
            Cell(str(row["rank"]), is_number=True),
            Cell(row.get("match_length") or "any"),
            *(tables.cell({"accuracy": value}, "accuracy") for value in row["accuracy"]),
            *[Cell("–")] * (depth - len(row["accuracy"])),
        ]
        for row in accuracies
    ]
    columns = ["source", "rank", "match length", *(f"depth {number_}" for number_ in range(1, depth + 1))]
    return Section(
        kind="calibrate",
        title=f"Calibration of {report['decoder']}, {_name(report.get('model') or '')}".removesuffix(", "),
        subtitle=f"{len(report['benchmark'])} trees, the fastest first",
        highlights=highlights,
        tables=[tables.of_rows("Benchmark", [{name: row.get(name) for name in names} for row in report["benchmark"]])],
        plots=drawn,
        answers=[],
        measured=_measured(source, settings={name: report.get(name) for name in ("prompts", "max_new_tokens")}),
        details=[
            tables.of_rows("Best tree of each width", report["widths"]),
            *([Table("Draft accuracy", columns, accuracy_rows)] if accuracy_rows else []),
        ],
    )


def _demo(source: Source) -> Section:
    report = source.report
    rows, models = report["rows"], report["models"]
    drawn = _by_group(rows, "speedup", "Speedup by model", "speedup over autoregressive decoding", 1.0, "model")
    spots: dict[str, list[Spot]] = {}
    for row in rows:
        y, loss = number(row, "mean_accepted_tokens"), number(models.get(str(row.get("model"))) or {}, "clean_loss")
        if y is not None and loss is not None and row.get("decoder") != _REFERENCE:
            spots.setdefault(str(row.get("decoder")), []).append(Spot(str(row["model"]), loss, y))
    if spots:
        drawn.append(_front(spots))
    offsets = {
        name: ([number({"x": value}, "x") for value in model.get("noise_accuracy") or []], index)
        for index, (name, model) in enumerate(models.items())
    }
    if any(values for values, _ in offsets.values()):
        note = "Share of correct predictions at noise positions, by distance from the clean text."
        drawn.append(plots.lines("Draft accuracy by offset", offsets, "offset", note))
    best = max(rows, key=lambda row: number(row, "speedup") or 0.0, default={})
    highlights = []
    if number(best, "speedup") is not None:
        about = f"{best.get('decoder')} on {best.get('model')}"
        highlights.append((tables.show("speedup", number(best, "speedup")), f"speedup, {about}"))
        highlights.append((tables.cell(best, "mean_accepted_tokens").text, f"mean accepted tokens, {about}"))
    exact = [number(row, "exact_share") for row in rows if number(row, "exact_share") is not None]
    if exact:
        highlights.append((tables.show("exact_share", min(exact)), "exact, at least"))
    losses = [{"model": name, "clean_loss": model.get("clean_loss")} for name, model in models.items()]
    return Section(
        kind="demo",
        title="Demo",
        subtitle="the same data and steps, with and without noise; and a published chat model, where there was one",
        highlights=highlights,
        tables=[tables.of_rows("Decoders", rows), tables.of_rows("Clean held-out loss, nats per token", losses)],
        plots=drawn,
        answers=choose(source),
        measured=[*_measured(source), ("seconds", f"{report['seconds']:.0f}")],
    )


def _by_group(
    rows: Sequence[dict], field: str, title: str, xlabel: str, reference: float | None, group: str | None = None
) -> list[Plot]:
    """A plot of a field by group and decoder; none where the rows have no groups, or no values."""
    group = group or next((name for name in _GROUPS if any(name in row for row in rows)), None)
    series: dict[str, list[Point]] = {}
    for row in rows:
        value = number(row, field)
        if group is not None and value is not None and "decoder" in row and row["decoder"] != _REFERENCE:
            point = Point(str(row.get(group)), value, number(row, f"{field}_stderr"))
            series.setdefault(str(row["decoder"]), []).append(point)
    note = _ERROR_BARS if any(point.error for points in series.values() for point in points) else ""
    return [plots.dots(title, series, xlabel, note, reference)] if series else []


def _front(spots: dict[str, list[Spot]]) -> Plot:
    note = "Up and to the left is better; the dashed line joins the points that no other point beats. "
    if any(spot.x_error or spot.y_error for of_series in spots.values() for spot in of_series):
        note += _ERROR_BARS
    labels = ("clean loss, nats per token", "mean accepted tokens")
    return plots.front("Mean accepted tokens against clean loss", spots, *labels, note)


def _accepted_lengths(samples: Sequence[dict]) -> dict[str, list[int]]:
    """Accepted lengths of every decoder; without those of autoregressive decoding, all 1, if there are others."""
    lengths: dict[str, list[int]] = {}
    for sample in samples:
        of_sample = [length for length in sample.get("accept_lengths") or [] if length > 0]
        if of_sample:
            lengths.setdefault(sample.get("decoder") or "", []).extend(of_sample)
    others = {name: values for name, values in lengths.items() if name != _REFERENCE}
    return others or lengths


def _noise_accuracies(runs: Sequence[dict], factors: Sequence[str]) -> dict[str, tuple[list[float | None], int]]:
    """Mean accuracy by offset of each setting."""
    settings: dict[str, list[list]] = {}
    for run in runs:
        if run.get("noise_accuracy"):
            settings.setdefault(_setting(run["setting"], factors), []).append(run["noise_accuracy"])
    result = {}
    for index, (setting, lists) in enumerate(settings.items()):
        means = []
        for offset in range(max(map(len, lists))):
            values = [number({"x": one[offset]}, "x") for one in lists if offset < len(one)]
            values = [value for value in values if value is not None]
            means.append(sum(values) / len(values) if values else None)
        result[setting] = (means, index)
    return result


def _accuracy_lines(rows: Sequence[dict]) -> dict[str, tuple[list[float | None], int]]:
    """The first three ranks of predictions, retrieval, and retrieval after the longest matches."""
    chosen = [row for row in rows if row["source"] == "jacobi" and row["rank"] < 3]
    retrieved = [row for row in rows if row["source"] == "retrieval" and row["rank"] == 0]
    chosen += [row for row in retrieved if row.get("match_length") in (None, "8+")]
    result = {}
    for row in chosen:
        match = row.get("match_length")
        name = f"retrieval, match {match}" if match else f"{row['source']}, rank {row['rank']}"
        result[name] = ([number({"x": value}, "x") for value in row["accuracy"]], int(row["source"] == "retrieval"))
    return result


def _acceptance(nodes: Sequence[dict]) -> dict[str, list[float]]:
    """Summed acceptance of the tree's nodes, by source and depth."""
    depths = [int(number(node, "depth") or 0) for node in nodes]
    result: dict[str, list[float]] = {}
    for node, depth in zip(nodes, depths, strict=True):
        acceptance = number(node, "acceptance")
        if acceptance is not None and depth > 0:
            of_source = result.setdefault(str(node.get("source")), [0.0] * max(depths))
            of_source[depth - 1] += acceptance
    return {source: values for source, values in result.items() if any(values)}


def _over_all_groups(rows: Sequence[dict]) -> list[dict]:
    """The rows over all groups; every row, if there is only one group."""
    group = next((name for name in _GROUPS if any(name in row for row in rows)), None)
    whole = [row for row in rows if group is not None and row.get(group) == "all"]
    return whole or list(rows)


def _fastest(rows: Sequence[dict]) -> dict | None:
    """The row with the highest speedup, of decoders other than the reference."""
    others = [row for row in rows if number(row, "speedup") is not None and row.get("decoder") != _REFERENCE]
    return max(others, key=lambda row: number(row, "speedup"), default=None)


def _series(row: dict) -> str:
    tree = row.get("tree")
    return f"{row.get('decoder')}" + (f", {tree}" if tree else "")


def _setting(values: dict, factors: Sequence[str]) -> str:
    """The values of the factors; texts stand for themselves."""
    found = {factor: values[factor] for factor in factors if factor in values}
    named = (value if isinstance(value, str) else f"{tables.label(name)} {value}" for name, value in found.items())
    return ", ".join(named) or "one setting"


def _name(model: str, models: Sequence[str] = ()) -> str:
    """The last part of a model's path, if it is unique among `models`."""
    short: Callable[[str], str] = lambda path: Path(path).name or path  # noqa: E731
    return model if sum(short(other) == short(model) for other in models) > 1 else short(model)


def _measured(source: Source, settings: dict | None = None) -> list[tuple[str, str]]:
    """How the figures came about."""
    report = source.report
    versions = dict(report.get("versions") or {})
    commit = report.get("commit") or versions.pop("commit", None)
    shown = {
        "command": report.get("command"),
        "model": report.get("model"),
        "dtype": report.get("dtype"),
        "settings": ", ".join(f"{name}={value}" for name, value in (settings or {}).items() if value is not None),
        "hardware": report.get("hardware"),
        "load average": number(report, "load_average") and f"{number(report, 'load_average'):.2f}",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "commit": commit,
        "date": report.get("date"),
    }
    return [(name, str(value)) for name, value in shown.items() if value]
