"""Decoders compared on the same prompts: a table of speed, forward passes and exactness.

The decoders alternate prompt by prompt, so that a slow phase of the machine affects all of them. Speedup is tokens/s
relative to `autoregressive` with the same weights.
"""

import collections
import dataclasses
import itertools
import sys
import time
from collections.abc import Mapping, Sequence

import numpy as np
from rich.progress import track
from rich.table import Table

from msn_jax.data import chat
from msn_jax.decode import batch as batches
from msn_jax.decode import drafters, engine
from msn_jax.decode.engine import Generation, Model
from msn_jax.decode.request import Prompt

DECODERS = (*drafters.DEFAULT_TREES, "auto")  # autoregressive first


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of the table: a model with a decoder, over all prompts."""

    model: str
    decoder: str
    mean_accepted_tokens: float  # new tokens / forward passes
    tokens_per_second: float  # prefill included, compilation excluded
    speedup: float
    exact_share: float  # completions equal to those of `autoregressive`
    new_tokens: int
    forward_passes: int


def measure(
    name: str,
    model: Model,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    rounds: int,
    seconds: float = float("inf"),
    decoders: Sequence[str] = DECODERS,
) -> tuple[list[Row], dict[str, list[Generation]]]:
    """Decodes with all decoders, once or several times.

    Args:
      name: of the model, for the table.
      model: with all programs compiled, see `compile_decoders`.
      prompts: decoded one at a time.
      max_new_tokens: limit of each completion.
      rounds: repetitions; the median time of each prompt counts.
      seconds: no repetition begins later than this; the first one always runs.
      decoders: `autoregressive` and others.

    Returns:
      The rows of the table, and each decoder's generations.
    """
    began, by_round = time.perf_counter(), []
    while len(by_round) < rounds and (not by_round or time.perf_counter() - began < seconds):
        by_round.append(collections.defaultdict(list))
        text = f"{name}, round {len(by_round)}"
        for prompt in track(prompts, text, disable=not sys.stdout.isatty()):
            for decoder in decoders:
                by_round[-1][decoder] += engine.generate(model, [prompt], decoder, max_new_tokens)
    reference = by_round[0]["autoregressive"]
    rates = {decoder: _tokens_per_second([generations[decoder] for generations in by_round]) for decoder in decoders}
    rows = []
    for decoder, generations in by_round[0].items():
        new_tokens = sum(generation.new_tokens for generation in generations)
        forward_passes = sum(generation.forward_passes for generation in generations)
        exact = [ours.tokens == theirs.tokens for ours, theirs in zip(generations, reference, strict=True)]
        rows.append(
            Row(
                model=name,
                decoder=decoder,
                mean_accepted_tokens=new_tokens / forward_passes,
                tokens_per_second=rates[decoder],
                speedup=rates[decoder] / rates["autoregressive"],
                exact_share=float(np.mean(exact)),
                new_tokens=new_tokens,
                forward_passes=forward_passes,
            )
        )
    return rows, by_round[0]


def compile_decoders(
    model: Model, prompts: Sequence[Prompt], max_new_tokens: int, decoders: Sequence[str] = DECODERS
) -> None:
    """Compiles the programs for these prompts, with these decoders; `auto` also times the passes of every width.

    One prompt of each padded length is decoded, which needs the same programs as all of them.
    """
    lengths = [len(chat.encode_prompt(model.tokenizer, prompt)) for prompt in prompts]
    by_length = {batches.bucket_size(length): prompt for length, prompt in zip(lengths, prompts, strict=True)}
    for decoder in decoders:
        engine.generate(model, list(by_length.values()), decoder, max_new_tokens)
    engine.wait_for_compilation(model)
    if "auto" in decoders:
        engine.generate(model, list(by_length.values()), "auto", max_new_tokens)


def _tokens_per_second(rounds: list[list[Generation]]) -> float:
    """All new tokens over the sum of each prompt's median time."""
    times = np.median([[generation.wall_time for generation in generations] for generations in rounds], axis=0)
    return sum(generation.new_tokens for generation in rounds[0]) / float(times.sum())


def to_table(rows: Sequence[Mapping], caption: str | None = None) -> Table:
    """Rows, as dicts, as a table for the terminal."""
    table = Table(title="Same output, fewer forward passes", caption=caption)
    for column in ("model", "decoder", "mean accepted tokens", "tokens/s", "speedup", "exact"):
        table.add_column(column, justify="left" if column in ("model", "decoder") else "right")
    for _, of_model in itertools.groupby(rows, lambda row: row["model"]):
        table.add_section()
        for row in of_model:
            table.add_row(*_cells(row))
    return table


def to_markdown(rows: Sequence[Mapping]) -> list[str]:
    """The same table as lines of Markdown."""
    lines = ["| model | decoder | mean accepted tokens | tokens/s | speedup | exact |", "|---|---|---|---|---|---|"]
    for row in rows:
        model, decoder, *figures = _cells(row)
        lines.append(f"| {' | '.join([model, f'`{decoder}`', *figures])} |")
    return lines


def typical(generations: Sequence[Generation]) -> Generation:
    """Among the longer half of the completions, the one with the median of mean accepted tokens.

    Completions that end with EOS are preferred: those that reach the limit repeat themselves, which is easy to draft.
    """
    ended = [generation for generation in generations if generation.finish_reason != "length"] or generations
    longer = sorted(ended, key=lambda generation: generation.new_tokens)[len(ended) // 2 :]
    return sorted(longer, key=lambda generation: generation.mean_accepted_tokens)[len(longer) // 2]


def _cells(row: Mapping) -> tuple[str, ...]:
    return (
        row["model"],
        row["decoder"],
        f"{row['mean_accepted_tokens']:.2f}",
        f"{row['tokens_per_second']:.0f}",
        f"{row['speedup']:.2f}x",
        f"{row['exact_share']:.0%}",
    )
