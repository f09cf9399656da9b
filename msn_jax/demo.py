"""The whole idea on this machine, in minutes: `make demo`.

Trains a small base model on the interpreter's own standard library, and from it two models with the same data and the
same number of steps: `sft`, the control, and `msn`, trained on noisy inputs. Both then complete held-out functions with
every decoder, and a table compares the decoders. A second call reuses finished stages.

The decoders of a model alternate prompt by prompt, so that a slow phase of the machine affects all of them. Speedup is
tokens/s relative to `autoregressive` with the same weights. Runs from a checkout and uses its `configs/demo.py`.
"""

import collections
import dataclasses
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import jax
import numpy as np
from absl import flags
from rich.console import Console
from rich.progress import track
from rich.table import Table

from configs.demo import get_config
from msn_jax import cli, metrics
from msn_jax.cli import InputError
from msn_jax.config import Config
from msn_jax.data import chat, corpora
from msn_jax.decode import display, drafters, engine
from msn_jax.decode.engine import Generation, Model

STAGES = ("base", "sft", "msn")
MODELS = ("sft", "msn")
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
# Large pages for the buffers of a training step; zeroing small pages takes a quarter of a step on a CPU. glibc's
# allocator reads this when a process starts; other allocators ignore it.
_ALLOCATOR = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
_ROUNDS = 3  # timed completions per prompt; the median time counts


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


def run_stage(stage: str, workdir: Path) -> float:
    """Trains one stage with the public program and prints the command.

    Returns its training time in seconds, also if an earlier call finished the stage.
    """
    command = [sys.executable, "-m", "msn_jax.train", f"--config=configs/demo.py:{stage}"]
    command.append(f"--workdir={workdir / stage}")
    if stage != "base":
        command.append(f"--config.train.init_from={workdir / 'base'}")
    settings = [f"{name}={value}" for name, value in _ALLOCATOR.items()]
    print("\n$ " + " ".join([*settings, "python", *command[1:]]), flush=True)
    began = time.perf_counter()
    finished = subprocess.run(command, env=os.environ | _ALLOCATOR, check=False)
    if finished.returncode:
        sys.exit(finished.returncode)
    seconds = workdir / stage / "seconds"
    if not seconds.exists():
        seconds.write_text(f"{time.perf_counter() - began:.1f}\n", encoding="utf-8")
    return float(seconds.read_text(encoding="utf-8"))


def held_out_prompts(model: Model, cfg: Config, count: int, max_new_tokens: int) -> list[str]:
    """Signatures and docstrings of held-out functions that fit into the context, in a fixed random order.

    Raises:
      InputError: none fits.
    """
    longest = cfg.model.max_length - max_new_tokens
    prompts = [
        record["prompt"]
        for record in corpora.load(cfg.data, "validation")
        if len(chat.encode_prompt(model.tokenizer, record["prompt"])) < longest
    ]
    if not prompts:
        raise InputError(
            f"--max_new_tokens={max_new_tokens}: leaves no space for a prompt in {cfg.model.max_length} tokens"
        )
    order = np.random.default_rng(0).permutation(len(prompts))
    return [prompts[i] for i in order[:count]]


def measure(name: str, model: Model, prompts: Sequence[str], max_new_tokens: int) -> tuple[list[Row], list[Generation]]:
    """The table's rows for one model, and its completions with `tr_jacobi`."""
    decoders = list(drafters.DEFAULT_TREES)
    generations: dict[str, list[list[Generation]]] = collections.defaultdict(list)  # decoder -> round -> prompts
    for round_number in range(_ROUNDS + 1):  # round 0 compiles
        in_round = collections.defaultdict(list)
        for prompt in track(prompts, f"{name}, round {round_number}", disable=not sys.stdout.isatty()):
            for decoder in decoders:
                in_round[decoder] += engine.generate(model, [prompt], decoder, max_new_tokens)
        for decoder in decoders if round_number else ():
            generations[decoder].append(in_round[decoder])

    reference = generations["autoregressive"][0]
    baseline = _tokens_per_second(generations["autoregressive"])
    rows = []
    for decoder in decoders:
        first = generations[decoder][0]
        rate = _tokens_per_second(generations[decoder])
        new_tokens, forward_passes = sum(one.new_tokens for one in first), sum(one.forward_passes for one in first)
        exact = np.mean([ours.tokens == theirs.tokens for ours, theirs in zip(first, reference, strict=True)])
        rows.append(
            Row(
                model=name,
                decoder=decoder,
                mean_accepted_tokens=new_tokens / forward_passes,
                tokens_per_second=rate,
                speedup=rate / baseline,
                exact_share=float(exact),
                new_tokens=new_tokens,
                forward_passes=forward_passes,
            )
        )
    return rows, generations["tr_jacobi"][0]


def _tokens_per_second(rounds: list[list[Generation]]) -> float:
    """All new tokens over the sum of each prompt's median time."""
    times = np.median([[generation.wall_time for generation in generations] for generations in rounds], axis=0)
    return sum(generation.new_tokens for generation in rounds[0]) / float(times.sum())


def report(seconds: float, workdir: Path, rows: list[Row]) -> dict:
    """The content of `report.json`."""
    final = {name: metrics.final_metrics(workdir / name) for name in MODELS}
    return {
        "hardware": hardware(),
        "versions": versions(),
        "seconds": seconds,
        "models": {
            name: {"clean_loss": values["eval_clean_loss"], "noise_accuracy": values["eval_noise_accuracy"]}
            for name, values in final.items()
        },
        "rows": [dataclasses.asdict(row) for row in rows],
    }


def hardware() -> str:
    """The devices that JAX runs on."""
    device = jax.devices()[0]
    kind = cli.processor() if device.platform == "cpu" else device.device_kind
    return f"{len(jax.devices())} x {device.platform} ({kind}), {os.cpu_count()} CPU cores"


def versions() -> dict[str, str]:
    """Versions of everything that affects speed and rounding, and the commit, if known."""
    by_name = {"python": platform.python_version(), **{name: metadata.version(name) for name in _PACKAGES}}
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):  # no git, or no repository
        return by_name
    return by_name | {"commit": commit.stdout.strip()}


def to_table(result: dict) -> Table:
    """The report as a table for the terminal."""
    losses = ", ".join(f"{name} {values['clean_loss']:.3f}" for name, values in result["models"].items())
    table = Table(title="Same output, fewer forward passes", caption=f"clean held-out loss, nats per token: {losses}")
    for column in ("model", "decoder", "mean accepted tokens", "tokens/s", "speedup", "exact"):
        table.add_column(column, justify="left" if column in ("model", "decoder") else "right")
    for row in result["rows"]:
        table.add_row(
            row["model"],
            row["decoder"],
            f"{row['mean_accepted_tokens']:.2f}",
            f"{row['tokens_per_second']:.0f}",
            f"{row['speedup']:.2f}x",
            f"{row['exact_share']:.0%}",
            end_section=row["decoder"] == list(drafters.DEFAULT_TREES)[-1],
        )
    return table


def to_markdown(result: dict) -> str:
    """The same table in Markdown."""
    lines = ["| model | decoder | mean accepted tokens | tokens/s | speedup | exact |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {row['model']} | `{row['decoder']}` | {row['mean_accepted_tokens']:.2f} | {row['tokens_per_second']:.0f} "
        f"| {row['speedup']:.2f}x | {row['exact_share']:.0%} |"
        for row in result["rows"]
    ]
    several = any(len(values["noise_accuracy"]) > 1 for values in result["models"].values())
    offsets = "offsets 1, 2, ..." if several else "offset 1"
    losses = "; ".join(
        f"{name}: clean held-out loss {values['clean_loss']:.3f} nats per token, draft accuracy at {offsets} "
        + ", ".join(f"{accuracy:.0%}" for accuracy in values["noise_accuracy"])
        for name, values in result["models"].items()
    )
    about = f"`make demo`, {result['seconds']:.0f} s on {result['hardware']}, float32, jax {result['versions']['jax']}"
    if "commit" in result["versions"]:
        about += f", commit {result['versions']['commit'][:7]}"
    return "\n".join([*lines, "", losses + ".", "", about + "."]) + "\n"


def typical(generations: Sequence[Generation]) -> Generation:
    """Among the longer half of the completions, the one with the median of mean accepted tokens.

    Completions that end with EOS are preferred: those that reach the limit repeat themselves, which is easy to draft.
    """
    ended = [generation for generation in generations if generation.finish_reason != "length"] or generations
    longer = sorted(ended, key=lambda generation: generation.new_tokens)[len(ended) // 2 :]
    return sorted(longer, key=lambda generation: generation.mean_accepted_tokens)[len(longer) // 2]


def main() -> None:
    """Trains, decodes, prints and writes the report."""
    args = flags.FLAGS
    workdir = cli.make_directory(args.workdir, "--workdir")
    seconds = sum(run_stage(stage, workdir) for stage in STAGES)
    began, rows = time.perf_counter(), []
    for name in MODELS:
        model = engine.load(workdir / name)
        prompts = held_out_prompts(model, get_config(name), args.prompts, args.max_new_tokens)
        print(f"\ndecoding {len(prompts)} held-out prompts with four decoders on {name}", flush=True)
        model_rows, generations = measure(name, model, prompts, args.max_new_tokens)
        rows += model_rows
    result = report(seconds + time.perf_counter() - began, workdir, rows)
    (workdir / "report.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (workdir / "report.md").write_text(to_markdown(result), encoding="utf-8")
    print("\nOne completion of msn with tr_jacobi; each colour change is a forward pass\n")
    display.show(model.tokenizer, typical(generations))
    display.save_svg(model.tokenizer, typical(generations), workdir / "output.svg")
    Console().print(to_table(result))
    print(f"{workdir / 'report.json'} and report.md hold these figures; {result['seconds']:.0f} s in total")


if __name__ == "__main__":
    flags.DEFINE_string("workdir", "runs/demo", "Directory for the stages' workdirs and the report.")
    flags.DEFINE_integer("prompts", 32, "Held-out functions to complete.", lower_bound=1)
    flags.DEFINE_integer("max_new_tokens", 256, "Limit of each completion, in tokens.", lower_bound=1)
    cli.run(main)
