"""Finds the token tree that decodes fastest, for this model, its texts and this machine.

    python -m msn_jax.calibrate --model=runs/demo/msn --prompts=prompts.jsonl

Which tree pays depends on which drafts are right and on what a wider pass costs. The prompts are answered
autoregressively; it is recorded what drafts a pass would find at each place of the answers (`decode/records.py`), and
for every width the tree with the most tokens a pass is searched (`decode/tree_search.py`). Passes of these widths are
timed. The trees that should be fastest then race against the default tree, that of the paper's released code, some
fixed widths and the root alone (`decode/tree_race.py`), and the fastest is written, with what was measured, as JSON:
into the model's directory, where `generate` looks for it, or to --output, for `generate --tree`. A picture of it lies
beside.

Speeds are tokens/s of single prompts, prefill included. They hold for this machine and dtype.
"""

import datetime
import os
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import jax
import jaxlib
import numpy as np
from absl import flags
from rich.console import Console
from rich.progress import track
from rich.table import Table

from msn_jax import answers, cli, config, request_files
from msn_jax.cli import InputError
from msn_jax.decode import engine, requests, tree_search
from msn_jax.decode import tree as trees
from msn_jax.decode.records import Records
from msn_jax.decode.requests import Request
from msn_jax.decode.session import Model
from msn_jax.decode.tree import EITHER, JACOBI, NOISE, RETRIEVAL, SOURCES, TokenTree
from msn_jax.decode.tree_race import ROOT_ALONE, Calibration, Expected, Racer, calibrate

_FEWEST_PROMPTS = 4
_COLOURS = {JACOBI: "#4c78a8", RETRIEVAL: "#f58518", EITHER: "#54a24b", NOISE: "#bab0ac"}


def marginal_table(known: Records) -> Table:
    """How often a guess is right by its source, rank and depth, over all places of the answers."""
    shown = Table(title="Right guesses, over all places", title_justify="left")
    for column in ("source", "rank", *(f"depth {depth}" for depth in range(1, 7))):
        shown.add_column(column, justify="right")
    exists = known.coming >= 0
    is_right = known.rows == known.coming[..., None]  # [B, N, D, K]
    shares = {("jacobi", rank): is_right[..., rank] for rank in range(min(6, is_right.shape[-1]))}
    found = known.found == known.coming[:, :, None, :]  # [B, N, R, D]
    shares |= {("retrieval", rank): found[:, :, rank] for rank in range(found.shape[2])}
    matches = known.agreement[:, :, 0, None]
    for low, high in ((1, 1), (2, 3), (4, 7), (8, 99)):
        among = np.where((matches >= low) & (matches <= high), found[:, :, 0], np.nan)
        shares[
            "retrieval, match of " + (f"{low}" if low == high else f"{low}+" if high == 99 else f"{low}-{high}"), 0
        ] = among
    for (source, rank), right in shares.items():
        cells = [np.asarray(right[..., d], float)[exists[..., d]] for d in range(6)]
        cells = [cell[~np.isnan(cell)] for cell in cells]
        shown.add_row(source, str(rank), *(f"{cell.mean():.1%}" if cell.size else "-" for cell in cells))
    return shown


def width_table(widths: Mapping[int, Expected]) -> Table:
    """Time of a pass and what is expected of the best tree, by width."""
    shown = Table(title="Best tree of each width, expected", title_justify="left")
    for column in ("width", "ms a pass", "x width 1", "tokens a pass", "tokens/s", "tree"):
        shown.add_column(column, justify="left" if column == "tree" else "right")
    for width, best in widths.items():
        figures = (1e3 * best.seconds, best.seconds / widths[1].seconds, best.tokens_per_pass)
        shown.add_row(str(width), *(f"{value:.2f}" for value in figures), f"{best.rate:.0f}", _describe(best.tree))
    return shown


def race_table(racers: Sequence[Racer]) -> Table:
    """Expected against measured, the fastest first."""
    shown = Table(title="Race, prefill included", title_justify="left")
    for column in ("tree", "width", "ms a pass", "tokens a pass: expected", "measured", "tokens/s: expected"):
        shown.add_column(column, justify="left" if column == "tree" else "right")
    for column in ("measured", "off by", "exact"):
        shown.add_column(column, justify="right")
    for racer in racers:
        guess = racer.expected
        figures = (1e3 * guess.seconds, guess.tokens_per_pass, racer.tokens_per_pass)
        rates = (f"{guess.rate:.0f}", f"{racer.rate:.0f}", f"{guess.rate / racer.rate - 1:+.0%}")
        width = str(guess.tree.width)
        shown.add_row(racer.name, width, *(f"{value:.2f}" for value in figures), *rates, f"{racer.exact_share:.0%}")
    return shown


def _describe(tree: TokenTree) -> str:
    counts = {name: tree.sources.count(source) for source, name in enumerate(SOURCES) if source}
    kinds = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    match = f", matches of {tree.min_match}+" if tree.count(RETRIEVAL) else ""
    return f"{tree.max_depth} deep: {kinds}{match}" if kinds else ROOT_ALONE


def write(result: Calibration, model: Model, decoder: str, settings: dict, path: Path) -> None:
    """The fastest tree with its figures as JSON, and a picture beside it."""
    winner = result.racers[0]
    tree = winner.expected.tree
    acceptance = tree_search.replay(tree, result.known).acceptance(tree)
    about = {
        "decoder": decoder,
        "model": model.name,
        "dtype": model.cfg.dtype,
        **settings,
        "hardware": f"{jax.device_count()} x {jax.devices()[0].device_kind} ({platform.machine()}), "
        f"{len(os.sched_getaffinity(0))} CPU cores",
        "versions": {"python": platform.python_version(), "jax": jax.__version__, "jaxlib": jaxlib.__version__},
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "chosen": winner.name,
        "expected_tokens_per_second": round(winner.expected.rate, 1),
        "measured_tokens_per_second": round(winner.rate, 1),
        "race": [
            {
                "tree": racer.name,
                "width": racer.expected.tree.width,
                "milliseconds": round(1e3 * racer.expected.seconds, 4),
                "expected_tokens_per_pass": round(racer.expected.tokens_per_pass, 3),
                "tokens_per_pass": round(racer.tokens_per_pass, 3),
                "expected_tokens_per_second": round(racer.expected.rate, 1),
                "tokens_per_second": round(racer.rate, 1),
                "exact_share": racer.exact_share,
            }
            for racer in result.racers
        ],
        "widths": [
            {
                "width": width,
                "milliseconds": round(1e3 * best.seconds, 4),
                "expected_tokens_per_pass": round(best.tokens_per_pass, 3),
                "expected_tokens_per_second": round(best.rate, 1),
            }
            for width, best in result.widths.items()
        ],
    }
    notes = [
        {"depth": int(tree.depth[node]), "acceptance": round(float(acceptance[node]), 4)}
        for node in range(1, tree.width)
    ]
    trees.save(tree, path, notes, about)
    draw(result, tree, acceptance, path.with_suffix(".png"))


def draw(result: Calibration, tree: TokenTree, acceptance: np.ndarray, path: Path) -> None:
    """The tree with the acceptance of its nodes, and speed by width, expected and measured."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.lines import Line2D

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(14, 6), width_ratios=(3, 2), layout="constrained")
    x = _columns(tree)
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
    left.set_title(f"{result.racers[0].name}: share of passes that accept each node")
    left.margins(0.08)
    left.axis("off")

    widths = result.widths
    right.plot(list(widths), [best.rate for best in widths.values()], "o-", label="expected of each width's best tree")
    for racer in result.racers:
        right.plot(racer.expected.tree.width, racer.rate, "x", color="#e45756", ms=8)
        right.annotate(
            racer.name, (racer.expected.tree.width, racer.rate), (4, 4), textcoords="offset points", fontsize=7
        )
    right.plot([], [], "x", color="#e45756", label="measured")
    right.set(xscale="log", xlabel="width", ylabel="tokens/s, prefill included", ylim=(0, None))
    right.set_xticks(list(widths), map(str, widths))
    right.minorticks_off()
    right.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _columns(tree: TokenTree) -> np.ndarray:
    """Where to draw each node: leaves side by side, and the others in the middle above their children."""
    x, leaves = np.zeros(tree.width), 0

    def place(node: int) -> None:
        nonlocal leaves
        children = [child for child in range(tree.width) if tree.parents[child] == node]
        for child in children:
            place(child)
        x[node] = np.mean(x[children]) if children else leaves
        leaves += not children

    place(0)
    return x


def _progress(items: Iterable, title: str) -> Iterable:
    """A progress bar on a terminal, a line elsewhere."""
    if sys.stdout.isatty():
        return track(items, title)
    print(title, flush=True)
    return items


def main() -> None:
    """Reads the flags, calibrates and writes."""
    args = flags.FLAGS
    asked = request_files.read(args.prompts, Request(""))
    if len(asked) < _FEWEST_PROMPTS:
        raise InputError(f"--prompts={args.prompts}: {len(asked)} prompts: give at least {_FEWEST_PROMPTS}")
    if args.output is not None:
        answers.check_output(args.output)
        if Path(args.output).suffix == ".png":
            raise InputError(f"--output={args.output}: name the JSON file; its picture is written beside it, as .png")
    model = engine.load(args.model, args.dtype)
    path = Path(args.output) if args.output is not None else Path(model.name) / trees.FILE_NAME
    answers.check_output(str(path))
    answers.check_output(str(path.with_suffix(".png")))
    limit = model.cfg.max_length
    encoded = [requests.encode(model.tokenizer, request.prompt, limit, place) for place, request in asked.items()]
    result = calibrate(model, encoded, args.decoder, args.max_new_tokens, args.max_width, _progress)
    settings = {"prompts": len(encoded), "max_new_tokens": args.max_new_tokens, "max_width": args.max_width}
    write(result, model, args.decoder, settings, path)
    for table in (marginal_table(result.known), width_table(result.widths), race_table(result.racers)):
        Console(width=None if sys.stdout.isatty() else 150).print(table)
    print(f"wrote {path} and {path.with_suffix('.png')}: {result.racers[0].name}")


if __name__ == "__main__":
    flags.DEFINE_string("model", None, "A training workdir, a Hugging Face directory, or OWNER/NAME.", required=True)
    flags.DEFINE_string("prompts", None, "A JSONL file of prompts.", required=True)
    flags.DEFINE_string("output", None, "A JSON file for the tree; tree.json in the model's directory if not given.")
    flags.DEFINE_enum("decoder", "tr_jacobi", list(tree_search.PALETTES), "Whose tree.")
    flags.DEFINE_integer("max_new_tokens", 128, "Limit of each answer, in tokens.", lower_bound=1)
    flags.DEFINE_integer("max_width", 64, "Nodes of the widest tree, with the root.", lower_bound=2, upper_bound=256)
    flags.DEFINE_enum("dtype", None, config.DTYPES, "Of parameters and computation; the model's own if not given.")
    cli.run(main)
