"""Finds the token tree that decodes fastest for a model, typical prompts and this machine.

    python -m msn_jax.calibrate --model=runs/demo/msn --prompts=prompts.jsonl

The best tree depends on which drafts are accepted and on the time of a wider forward pass. The program generates
completions autoregressively, traces the drafts that a forward pass would find at each position
(`decode/draft_traces.py`), and searches for the tree of every width with the most tokens per forward pass
(`decode/tree_search.py`). It times forward passes of these widths and benchmarks the trees with the best estimates
against the default tree, the tree of the paper's released code, some fixed widths and the root alone
(`decode/tree_benchmark.py`). The fastest tree and all measurements are written as JSON: into the model's directory,
where `generate` finds it, or to --output, for `generate --tree` and for GGUF models. A plot is written next to it. With
--adapter, the trees have noise tails, and the fastest one is written into the adapter's directory.

Speeds are tokens/s at batch size 1, prefill included. They hold for this machine and dtype. A prompt's own settings
(temperature, limits, stop strings) apply to its completion.
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from absl import flags
from rich.console import Console
from rich.progress import track
from rich.table import Table

from msn_jax import cli, config, environment, outputs, request_files
from msn_jax.cli import InputError
from msn_jax.decode import drafters, models, tree_search
from msn_jax.decode import tree as trees
from msn_jax.decode.draft_traces import DraftTraces
from msn_jax.decode.models import Model
from msn_jax.decode.request import Request, encode_prompt
from msn_jax.decode.tree import JACOBI, NOISE, RETRIEVAL, RETRIEVAL_OR_JACOBI, SOURCES, TokenTree
from msn_jax.decode.tree_benchmark import ROOT_ALONE, Calibration, Candidate, Estimate, calibrate
from msn_jax.gguf import container

_MIN_PROMPTS = 4
_COLOURS = {JACOBI: "#4c78a8", RETRIEVAL: "#f58518", RETRIEVAL_OR_JACOBI: "#54a24b", NOISE: "#bab0ac"}
_MATCH_LENGTHS = {"1": (1, 1), "2-3": (2, 3), "4-7": (4, 7), "8+": (8, 99)}  # bins of `draft_accuracy`
_SHOWN_DEPTHS = 6  # of `draft_accuracy`


def draft_accuracy(traces: DraftTraces) -> list[dict]:
    """Draft accuracy by source and rank, over all positions of the completions, as JSON.

    Returns:
      Rows `{"source", "rank", "match_length", "accuracy"}`: `match_length` is the bin of the matched suffix, None for
      all drafts; `accuracy` is a list by depth, from 1, with None where there is no draft.
    """
    exists = traces.future_tokens >= 0
    is_correct = traces.jacobi == traces.future_tokens[..., None]  # [B, N, D, K]
    rows = [("jacobi", rank, None, is_correct[..., rank]) for rank in range(min(6, is_correct.shape[-1]))]
    is_retrieved = traces.retrieved == traces.future_tokens[:, :, None, :]  # [B, N, R, D]
    rows += [("retrieval", rank, None, is_retrieved[:, :, rank]) for rank in range(is_retrieved.shape[2])]
    lengths = traces.match_lengths[:, :, 0, None]
    for name, (low, high) in _MATCH_LENGTHS.items():
        in_bin = np.where((lengths >= low) & (lengths <= high), is_retrieved[:, :, 0], np.nan)
        rows.append(("retrieval", 0, name, in_bin))
    result = []
    for source, rank, match_length, correct in rows:
        cells = [np.asarray(correct[..., d], float)[exists[..., d]] for d in range(_SHOWN_DEPTHS)]
        cells = [cell[~np.isnan(cell)] for cell in cells]
        accuracy = [round(float(cell.mean()), 4) if cell.size else None for cell in cells]
        result.append({"source": source, "rank": rank, "match_length": match_length, "accuracy": accuracy})
    return result


def accuracy_table(rows: Sequence[Mapping]) -> Table:
    """The rows of `draft_accuracy` as a table for the terminal."""
    table = Table(title="Draft accuracy, over all positions", title_justify="left")
    for column in ("source", "rank", *(f"depth {depth}" for depth in range(1, _SHOWN_DEPTHS + 1))):
        table.add_column(column, justify="right")
    for row in rows:
        match = "" if row["match_length"] is None else f", match length {row['match_length']}"
        cells = ("-" if accuracy is None else f"{accuracy:.1%}" for accuracy in row["accuracy"])
        table.add_row(row["source"] + match, str(row["rank"]), *cells)
    return table


def width_table(widths: Mapping[int, Estimate]) -> Table:
    """Time of a forward pass and the estimate for the best tree, by width."""
    table = Table(title="Best tree of each width, estimated", title_justify="left")
    for column in ("width", "ms/pass", "x width 1", "tokens/pass", "tokens/s", "tree"):
        table.add_column(column, justify="left" if column == "tree" else "right")
    for width, best in widths.items():
        figures = (1e3 * best.seconds, best.seconds / widths[1].seconds, best.mean_accepted_tokens)
        table.add_row(str(width), *(f"{value:.2f}" for value in figures), f"{best.rate:.0f}", _describe(best.tree))
    return table


def benchmark_table(candidates: Sequence[Candidate]) -> Table:
    """Estimates and measurements, the fastest tree first."""
    table = Table(title="Benchmark, prefill included", title_justify="left")
    for column in ("tree", "width", "ms/pass", "tokens/pass: estimated", "measured", "tokens/s: estimated"):
        table.add_column(column, justify="left" if column == "tree" else "right")
    for column in ("measured", "error", "exact"):
        table.add_column(column, justify="right")
    for candidate in candidates:
        estimate, rate = candidate.estimate, candidate.rate
        figures = (1e3 * estimate.seconds, estimate.mean_accepted_tokens, candidate.mean_accepted_tokens)
        table.add_row(
            candidate.name,
            str(estimate.tree.width),
            *(f"{value:.2f}" for value in figures),
            *(f"{estimate.rate:.0f}", f"{rate:.0f}", f"{estimate.rate / rate - 1:+.0%}"),
            f"{candidate.exact_share:.0%}",
        )
    return table


def _describe(tree: TokenTree) -> str:
    counts = {name: tree.sources.count(source) for source, name in enumerate(SOURCES) if source}
    nodes = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    match = f", min_match {tree.min_match}" if tree.num_ranks(RETRIEVAL) else ""
    return f"depth {tree.max_depth}: {nodes}{match}" if nodes else ROOT_ALONE


def write(result: Calibration, model: Model, decoder: str, settings: dict, path: Path) -> None:
    """Writes the fastest tree and the measurements as JSON, and a plot next to it."""
    fastest = result.candidates[0]
    tree = fastest.estimate.tree
    acceptance = tree_search.replay(tree, result.traces).acceptance(tree)
    about = {
        "decoder": decoder,
        "model": model.name,
        "dtype": model.cfg.dtype,
        **settings,
        **environment.environment(),
        "chosen": fastest.name,
        "estimated_tokens_per_second": round(fastest.estimate.rate, 1),
        "measured_tokens_per_second": round(fastest.rate, 1),
        "benchmark": [
            {
                "tree": candidate.name,
                **_estimate_json(candidate.estimate),
                "mean_accepted_tokens": round(candidate.mean_accepted_tokens, 3),
                "tokens_per_second": round(candidate.rate, 1),
                "exact_share": candidate.exact_share,
            }
            for candidate in result.candidates
        ],
        "widths": [_estimate_json(best) for best in result.widths.values()],
        "draft_accuracy": draft_accuracy(result.traces),
    }
    notes = [
        {"depth": int(tree.depth[node]), "acceptance": round(float(acceptance[node]), 4)}
        for node in range(1, tree.width)
    ]
    trees.save(tree, path, notes, about)
    draw(result, tree, acceptance, path.with_suffix(".png"))


def _estimate_json(estimate: Estimate) -> dict:
    return {
        "width": estimate.tree.width,
        "milliseconds": round(1e3 * estimate.seconds, 4),
        "estimated_mean_accepted_tokens": round(estimate.mean_accepted_tokens, 3),
        "estimated_tokens_per_second": round(estimate.rate, 1),
    }


def draw(result: Calibration, tree: TokenTree, acceptance: np.ndarray, path: Path) -> None:
    """Plots the tree with the acceptance of its nodes, and speed by width, estimated and measured."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.lines import Line2D

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(14, 6), width_ratios=(3, 2), layout="constrained")
    x = trees.columns(tree)
    for node in range(1, tree.width):
        parent = tree.parents[node]
        left.plot(
            [x[parent], x[node]],
            [-tree.depth[parent], -tree.depth[node]],
            color="#888888",
            lw=0.4 + 4 * acceptance[node],
            zorder=1,
        )
    colours = [_COLOURS.get(source, "#222222") for source in tree.sources]
    left.scatter(x, -tree.depth, s=60 + 500 * acceptance, c=colours, edgecolors="#444444", linewidths=0.5, zorder=2)
    for node in range(1, tree.width):
        text = f"{acceptance[node]:.0%}"
        left.annotate(text, (x[node], -tree.depth[node]), (0, -15), textcoords="offset points", ha="center", fontsize=7)
    marks = [Line2D([], [], marker="o", ls="", color=_COLOURS[source], label=SOURCES[source]) for source in _COLOURS]
    left.legend(handles=marks, loc="upper right", fontsize=8)
    left.set_title(f"{result.candidates[0].name}: share of forward passes that accept each node")
    left.margins(0.08)
    left.axis("off")

    widths = result.widths
    right.plot(list(widths), [best.rate for best in widths.values()], "o-", label="best tree of each width, estimated")
    for candidate in result.candidates:
        right.plot(candidate.estimate.tree.width, candidate.rate, "x", color="#e45756", ms=8)
        right.annotate(
            candidate.name,
            (candidate.estimate.tree.width, candidate.rate),
            (4, 4),
            textcoords="offset points",
            fontsize=7,
        )
    right.plot([], [], "x", color="#e45756", label="measured")
    right.set(xscale="log", xlabel="width", ylabel="tokens/s, prefill included", ylim=(0, None))
    right.set_xticks(list(widths), map(str, widths))
    right.minorticks_off()
    right.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _progress(items: Iterable, title: str) -> Iterable:
    """A progress bar on a terminal, a line elsewhere."""
    if sys.stdout.isatty():
        return track(items, title)
    print(title, flush=True)
    return items


def settings(requests: Sequence[Request], max_width: int) -> dict:
    """The settings of a calibration, for its JSON file; the shortest and the longest limit where they differ."""
    limits = [request.max_new_tokens for request in requests]
    limit = min(limits) if min(limits) == max(limits) else [min(limits), max(limits)]
    return {"prompts": len(requests), "max_new_tokens": limit, "max_width": max_width}


def main() -> None:
    """Reads the flags, calibrates and writes."""
    args = flags.FLAGS
    requests = request_files.read(args.prompts, Request("", max_new_tokens=args.max_new_tokens))
    if len(requests) < _MIN_PROMPTS:
        raise InputError(f"--prompts={args.prompts}: has {len(requests)} prompts; give at least {_MIN_PROMPTS}")
    if args.output is not None:
        outputs.check_output(args.output)
        if Path(args.output).suffix == ".png":
            raise InputError(f"--output={args.output}: name the JSON file; its plot is written next to it, as .png")
    elif args.adapter is None and container.is_gguf(Path(args.model)):
        raise InputError(
            f"--model={args.model}: is a GGUF file, next to which no tree is stored: name a JSON file with --output"
        )
    for location, request in requests.items():
        request.check(f"{location}: ")
    model = models.load(args.model, args.dtype, adapter=args.adapter)
    if model.adapter is not None and args.decoder not in drafters.ADAPTED_TREES:
        raise InputError(f"--decoder={args.decoder}: does not use the adapter; choose tr_jacobi or jacobi")
    if model.adapter is None and args.adapter is not None:
        raise InputError(
            f"--adapter={args.adapter}: is active at every token, so its trees are those of the merged model: merge it "
            "with `convert` and calibrate that"
        )
    directory = model.name if model.adapter is None else model.adapter.name
    path = Path(args.output) if args.output is not None else Path(directory) / trees.FILE_NAME
    outputs.check_output(str(path))
    outputs.check_output(str(path.with_suffix(".png")))
    limit = model.cfg.max_length
    encoded = [encode_prompt(model.tokenizer, request, limit, location) for location, request in requests.items()]
    result = calibrate(model, encoded, list(requests.values()), args.decoder, args.max_width, _progress)
    write(result, model, args.decoder, settings(list(requests.values()), args.max_width), path)
    accuracies = accuracy_table(draft_accuracy(result.traces))
    for table in (accuracies, width_table(result.widths), benchmark_table(result.candidates)):
        Console(width=None if sys.stdout.isatty() else 150).print(table)
    print(f"wrote {path} and {path.with_suffix('.png')}: {result.candidates[0].name}")


if __name__ == "__main__":
    flags.DEFINE_string(
        "model", None, "A training workdir, a Hugging Face directory, FILE.gguf, or OWNER/NAME.", required=True
    )
    flags.DEFINE_string("adapter", None, "A gated adapter's directory: the trees are for drafts from it.")
    flags.DEFINE_string("prompts", None, "A JSONL file of prompts.", required=True)
    flags.DEFINE_string(
        "output", None, "A JSON file for the tree; default: tree.json in the model's directory. Required for FILE.gguf."
    )
    flags.DEFINE_enum("decoder", "tr_jacobi", list(tree_search.NODE_SOURCES), "The decoder that the tree is for.")
    flags.DEFINE_integer("max_new_tokens", 128, "Limit of each completion, in tokens.", lower_bound=1)
    flags.DEFINE_integer("max_width", 64, "Nodes of the widest tree, root included.", lower_bound=2, upper_bound=256)
    flags.DEFINE_enum("dtype", None, config.DTYPES, "Of parameters and computation; default: the model's own.")
    cli.run(main)
