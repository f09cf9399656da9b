"""Sections about runs of demo."""

from msn_jax.reports import section, tables
from msn_jax.reports.answers import choose
from msn_jax.reports.plots import Spot
from msn_jax.reports.section import REFERENCE, Highlight, Section
from msn_jax.reports.sources import Source, number


def build(source: Source) -> Section:
    """The section of a run."""
    report = source.report
    rows, models = report["rows"], report["models"]
    spots: dict[str, list[Spot]] = {}
    for row in rows:
        y, loss = number(row, "mean_accepted_tokens"), number(models.get(str(row.get("model"))) or {}, "clean_loss")
        if y is not None and loss is not None and row.get("decoder") != REFERENCE:
            spots.setdefault(str(row.get("decoder")), []).append(Spot(str(row["model"]), loss, y))
    best = max(rows, key=lambda row: number(row, "speedup") or 0.0, default={})
    about = f"{best.get('decoder')} on {best.get('model')}"
    highlights = [one for field in ("speedup", "mean_accepted_tokens") for one in section.highlight(best, field, about)]
    exact = [number(row, "exact_share") for row in rows if number(row, "exact_share") is not None]
    if exact:
        highlights.append(Highlight(tables.show("exact_share", min(exact)), "exact, the lowest share of a row"))
    losses = [{"model": name, "clean_loss": model.get("clean_loss")} for name, model in models.items()]
    title, xlabel = "Speedup by model", "speedup over autoregressive decoding"
    offsets = {name: section.numbers(model.get("noise_accuracy") or []) for name, model in models.items()}
    return Section(
        kind="demo",
        title="Demo",
        subtitle="The same data and steps with and without noise, and a published chat model where there was one",
        highlights=highlights,
        tables=[tables.of_rows("Decoders", rows), tables.of_rows("Clean held-out loss, nats per token", losses)],
        plots=[
            *section.by_group(rows, "model", "speedup", title, xlabel, 1.0),
            *section.front(spots),
            *section.accuracy_by_offset(offsets),
        ],
        answers=choose(source),
        measured=[*section.measured(source), ("seconds", f"{report['seconds']:.0f}")],
        details=[],
    )
