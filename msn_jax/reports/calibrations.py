"""Sections about trees that calibrate wrote."""

from collections.abc import Sequence

from msn_jax.reports import plots, section, tables
from msn_jax.reports.plots import Plot
from msn_jax.reports.section import REFERENCE, Highlight, Section
from msn_jax.reports.sources import Source, number
from msn_jax.reports.tables import Cell, Table

_SOURCES = ("jacobi", "retrieval", "retrieval_or_jacobi", "noise")  # in this order, so that colours agree
_SETTINGS = ("prompts", "max_new_tokens", "max_width")


def build(source: Source) -> Section:
    """The section of a calibration."""
    report, accuracies = source.report, source.report.get("draft_accuracy") or []
    highlights = [Highlight(report["chosen"], "fastest tree")]
    rates = {str(row.get("tree")): number(row, "tokens_per_second") for row in report["benchmark"]}
    rate, reference = rates.get(report["chosen"]), rates.get(REFERENCE)
    if rate is not None:
        highlights.append(Highlight(tables.show("tokens_per_second", rate), "tokens/s, prefill included"))
        if reference:
            highlights.append(Highlight(tables.show("speedup", rate / reference), "over the root alone"))
    model = section.model_name(report.get("model") or "")
    return Section(
        kind="calibrate",
        title=f"Calibration of {report['decoder']}" + (f", {model}" if model else ""),
        subtitle=f"{len(report['benchmark'])} trees, the fastest first",
        highlights=highlights,
        tables=[tables.of_rows("Benchmark", report["benchmark"])],
        plots=[*_accuracy(accuracies), *_acceptance(report["nodes"]), *_by_width(report["widths"])],
        answers=[],
        measured=section.measured(source, {name: report.get(name) for name in _SETTINGS}),
        details=[
            tables.of_rows("Best tree of each width", report["widths"]),
            *([_accuracy_table(accuracies)] if accuracies else []),
        ],
    )


def _accuracy(rows: Sequence[dict]) -> list[Plot]:
    """The first three ranks of predictions, retrieval, and retrieval after the longest matches."""
    series = {}
    for row in rows:
        match, values = row.get("match_length"), section.numbers(row["accuracy"])
        if row["source"] == "jacobi" and row["rank"] < 3:
            series[f"jacobi, rank {row['rank']}"] = (values, 0)
        if row["source"] == "retrieval" and row["rank"] == 0 and match in (None, "8+"):
            series[f"retrieval, match {match}" if match else "retrieval"] = (values, 1)
    note = "Share of positions at which a draft of this source is correct, whether or not the tree asks for it."
    return [plots.lines("Draft accuracy by depth and source", series, "depth", note)] if series else []


def _acceptance(nodes: Sequence[dict]) -> list[Plot]:
    """Summed acceptance of the tree's nodes, by source and depth."""
    depths = [int(number(node, "depth") or 0) for node in nodes]
    parts: dict[str, list[float]] = {}
    for node, depth in zip(nodes, depths, strict=True):
        acceptance = number(node, "acceptance")
        if acceptance is not None and depth > 0:
            parts.setdefault(str(node.get("source")), [0.0] * max(depths))[depth - 1] += acceptance
    ordered = sorted(parts, key=lambda source: _SOURCES.index(source) if source in _SOURCES else len(_SOURCES))
    parts = {source: parts[source] for source in ordered if any(parts[source])}
    note = "Share of forward passes that accept a node of this source at this depth, with the chosen tree."
    return [plots.stacks("Acceptance by depth and source", parts, "depth", note)] if parts else []


def _by_width(rows: Sequence[dict]) -> list[Plot]:
    widths = [row for row in rows if number(row, "width") is not None]
    drawn = []
    for field, title, ylabel in (
        ("estimated_tokens_per_second", "Estimated speed of the best tree of each width", "tokens/s"),
        ("milliseconds", "Time of a forward pass by width", "ms"),
    ):
        values = [number(row, field) for row in widths]
        if len(widths) > 1 and any(value is not None for value in values):
            xs = [int(row["width"]) for row in widths]
            line = {ylabel: (values, 0)}
            drawn.append(plots.lines(title, line, "nodes of the tree", "", xs, is_share=False, ylabel=ylabel))
    return drawn


def _accuracy_table(rows: Sequence[dict]) -> Table:
    depth = max(len(row["accuracy"]) for row in rows)
    cells = [
        [
            Cell(row["source"]),
            Cell(str(row["rank"]), is_number=True),
            Cell(row.get("match_length") or "any"),
            *(tables.cell({"accuracy": value}, "accuracy") for value in row["accuracy"]),
            *[Cell("–")] * (depth - len(row["accuracy"])),
        ]
        for row in rows
    ]
    columns = ["source", "rank", "match length", *(f"depth {number}" for number in range(1, depth + 1))]
    return Table("Draft accuracy", columns, cells)
