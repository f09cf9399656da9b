"""Sections about runs of evaluate, and the first table of a page with several of them."""

from collections.abc import Sequence

from msn_jax.reports import plots, section, tables
from msn_jax.reports.answers import choose
from msn_jax.reports.plots import Plot
from msn_jax.reports.section import REFERENCE, Section
from msn_jax.reports.sources import Source, number
from msn_jax.reports.tables import Cell, Table

_SUITES = {
    "gsm8k": "GSM8K",
    "human_eval": "HumanEval",
    "mbpp": "MBPP",
    "mmlu": "MMLU",
    "mt_bench": "MT-bench",
    "spec_bench": "Spec-Bench",
    "speed_bench": "SPEED-Bench",
}
_SCORES = ("strict_match", "flexible_match", "accuracy", "pass@1", "pass@10", "pass@100")
_SPEEDS = ("speedup", "mean_accepted_tokens")
_TIMED_SUITES = ("spec_bench", "speed_bench")
_GROUPS = ("group", "category", "subject")
_MAX_ROWS = 40  # of a table that is not folded
_MAX_HIGHLIGHTS = 4


def build(source: Source) -> Section:
    """The section of a run."""
    report, rows = source.report, source.report["rows"]
    name = _SUITES.get(report["suite"], report["suite"])
    whole, group = _over_all_groups(rows), _group(rows)
    best = _fastest(whole) or (whole[-1] if whole else {})
    about = str(best.get("decoder", ""))
    highlights = [one for field in (*_SCORES, *_SPEEDS, "exact") for one in section.highlight(best, field, about)]
    lengths, is_long = _accepted_lengths(source.samples), len(rows) > _MAX_ROWS
    drawn = section.by_group(rows, group, "speedup", "Speedup by group", "speedup over autoregressive decoding", 1.0)
    title = "Mean accepted tokens by group"
    drawn += section.by_group(rows, group, "mean_accepted_tokens", title, "tokens per forward pass")
    if lengths:
        note = "How many tokens a forward pass emitted, over all answers."
        drawn.append(plots.histogram("Accepted lengths", lengths, note))
    drawn += _acceptance(whole)
    return Section(
        kind="evaluate",
        title=f"{name}, {_model_names([report])[0]}",
        subtitle=f"{report['questions']:,} of {report['of']:,} questions",
        highlights=highlights[:_MAX_HIGHLIGHTS],
        tables=[tables.of_rows("Results", whole if is_long else rows, "± one standard error.")],
        plots=drawn,
        answers=choose(source),
        measured=section.measured(source, report.get("settings") or {}),
        details=[tables.of_rows("All groups", rows)] if is_long else [],
    )


def speed_beside_quality(sources: Sequence[Source]) -> Table | None:
    """Models by scores of suites, next to speedup and mean accepted tokens; None for fewer than two evaluations.

    Of several runs of a model on a suite, the one with the most questions counts.
    """
    reports = [source.report for source in sources if source.kind == "evaluate"]
    runs: dict[tuple[str, str], dict] = {}
    for model, report in zip(_model_names(reports), reports, strict=True):
        key = (model, report["suite"])
        if key not in runs or runs[key]["questions"] < report["questions"]:
            runs[key] = report
    if len(runs) < 2:
        return None
    by_model: dict[str, dict[str, Cell]] = {model: {} for model, _ in runs}
    for (model, suite), report in sorted(runs.items(), key=lambda item: item[0][1] in _TIMED_SUITES):  # these come last
        by_model[model] |= _summary_cells(suite, report)
    columns = list(dict.fromkeys(column for cells in by_model.values() for column in cells))
    speeds = [tables.label(field) for field in _SPEEDS if tables.label(field) in columns]
    columns = [column for column in columns if column not in speeds] + speeds
    rows = [[Cell(model), *(cells.get(column, Cell("–")) for column in columns)] for model, cells in by_model.items()]
    note = "± one standard error. Below a value: how many of the suite's questions it is from."
    if "speedup" in speeds:
        note += " Speedup is that of the fastest decoder, relative to autoregressive decoding of the same model."
    return Table("Speed beside quality", ["model", *columns], rows, note)


def _model_names(reports: Sequence[dict]) -> list[str]:
    """The name of each run's model, with adapter and dtype where it has or needs them; equal names, equal models."""
    paths = [report["model"] for report in reports]
    identities = [(report["model"], report.get("adapter"), report.get("dtype")) for report in reports]
    names = []
    for model, adapter, dtype in identities:
        others = {other for other in identities if other[0] == model}
        name = section.model_name(model, list(dict.fromkeys(paths)))
        if adapter:
            several = len({other[1] for other in others if other[1]}) > 1
            name += f" + {adapter}" if several else " + adapter"
        names.append(f"{name}, {dtype}" if dtype and len({other[2] for other in others}) > 1 else name)
    return names


def _summary_cells(suite: str, report: dict) -> dict[str, Cell]:
    """The cells of one run by column. Scores are those of the first decoder: they do not depend on it."""
    whole, count = _over_all_groups(report["rows"]), f"{report['questions']:,} of {report['of']:,}"
    name, cells = _SUITES.get(suite, suite), {}
    for field in _SCORES:
        row = next((row for row in whole if number(row, field) is not None), None)
        if row is not None:
            cells[f"{name} {tables.label(field)}"] = tables.cell(row, field, count)
    best = _fastest(whole) or max(whole, key=lambda row: number(row, "mean_accepted_tokens") or 0.0, default={})
    about = f"{best.get('decoder')}, {name}, {count}"
    fields = [field for field in _SPEEDS if number(best, field) is not None]
    return cells | {tables.label(field): tables.cell(best, field, about) for field in fields}


def _accepted_lengths(samples: Sequence[dict]) -> dict[str, list[int]]:
    """Accepted lengths of every decoder; without those of autoregressive decoding, all 1, if there are others."""
    lengths: dict[str, list[int]] = {}
    for sample in samples:
        of_sample = [length for length in sample.get("accept_lengths") or [] if length > 0]
        if of_sample:
            lengths.setdefault(sample.get("decoder") or "", []).extend(of_sample)
    others = {name: values for name, values in lengths.items() if name != REFERENCE}
    return others or lengths


def _acceptance(rows: Sequence[dict]) -> list[Plot]:
    """The share of forward passes that accepted a draft at each position, for every decoder that drafts."""
    shares = {str(row.get("decoder")): section.numbers(row.get("accepted_by_position") or []) for row in rows}
    series = {name: (values, number) for number, (name, values) in enumerate(shares.items()) if values}
    note = "Share of forward passes that accepted at least so many draft tokens."
    return [plots.lines("Acceptance by position", series, "position of the draft token", note)] if series else []


def _group(rows: Sequence[dict]) -> str | None:
    """The field that names the groups of the rows."""
    return next((name for name in _GROUPS if any(name in row for row in rows)), None)


def _over_all_groups(rows: Sequence[dict]) -> list[dict]:
    """The rows over all groups; every row, if there is only one group."""
    group = _group(rows)
    return [row for row in rows if group is not None and row.get(group) == "all"] or list(rows)


def _fastest(rows: Sequence[dict]) -> dict | None:
    """The row with the highest speedup, of decoders other than the reference."""
    others = [row for row in rows if number(row, "speedup") is not None and row.get("decoder") != REFERENCE]
    return max(others, key=lambda row: number(row, "speedup"), default=None)
