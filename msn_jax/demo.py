"""The whole idea on this machine, in minutes: `make demo`.

Trains a small base model on the interpreter's own standard library, and from it two models with the same data and the
same number of steps: `sft`, the control, and `msn`, whose inputs carry noise. Then both write the bodies of functions
they have never seen, with every decoder, and a table says what came of it. Finished stages are reused.

Every decoder of a model answers the same prompts in the same run, one after another on each prompt, so that a slow
moment of the machine meets all of them. Speedup is tokens/s over those of `autoregressive` with the same weights.
Runs from a checkout, whose `configs/demo.py` it follows.
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
# Large pages for the memory of a step, which the system else zeroes in small ones: a quarter of a step on CPUs. An
# allocator reads this before the program begins; others than glibc's do not know it.
_ALLOCATOR = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
_ROUNDS = 3  # every prompt is answered this often; the median time counts


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table: a model with a decoder, over all prompts."""

    model: str
    decoder: str
    mean_accepted_tokens: float  # new tokens / forward passes
    tokens_per_second: float  # prefill included, compilation not
    speedup: float
    exact_share: float  # answers equal to those of `autoregressive`
    new_tokens: int
    forward_passes: int


def run_stage(stage: str, workdir: Path) -> float:
    """Trains one stage with the program that users start, and shows the command. Returns the seconds it took, also
    where it was finished by an earlier call.
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
    """Signatures and docstrings of functions in held-out files, in a fixed random order, that fit into the context.

    Raises:
      InputError: none does.
    """
    longest = cfg.model.max_length - max_new_tokens
    prompts = [
        record["prompt"]
        for record in corpora.load(cfg.data, "validation")
        if len(chat.encode_prompt(model.tokenizer, record["prompt"])) < longest
    ]
    if not prompts:
        raise InputError(f"--max_new_tokens={max_new_tokens}: no prompt fits beside it into {cfg.model.max_length}")
    order = np.random.default_rng(0).permutation(len(prompts))
    return [prompts[i] for i in order[:count]]


def measure(name: str, model: Model, prompts: Sequence[str], max_new_tokens: int) -> tuple[list[Row], list[Generation]]:
    """The table's rows of one model, and its answers with `tr_jacobi`."""
    decoders = list(drafters.DEFAULT_TREES)
    answers: dict[str, list[list[Generation]]] = collections.defaultdict(list)  # decoder -> round -> answers

    def answer(prompt: str, decoder: str) -> Generation:
        return engine.generate(model, [prompt], decoder, max_new_tokens)[0]

    for round_number in range(_ROUNDS + 1):  # round 0 compiles
        in_round = collections.defaultdict(list)
        for prompt in track(prompts, f"{name}, round {round_number}", disable=not sys.stdout.isatty()):
            for decoder in decoders:
                in_round[decoder].append(answer(prompt, decoder))
        for decoder in decoders if round_number else ():
            answers[decoder].append(in_round[decoder])

    reference = answers["autoregressive"][0]
    baseline = _tokens_per_second(answers["autoregressive"])
    rows = []
    for decoder in decoders:
        first = answers[decoder][0]
        rate = _tokens_per_second(answers[decoder])
        new_tokens, forward_passes = sum(a.new_tokens for a in first), sum(a.forward_passes for a in first)
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
    return rows, answers["tr_jacobi"][0]


def _tokens_per_second(rounds: list[list[Generation]]) -> float:
    """All new tokens over the sum of each answer's median time."""
    times = np.median([[answer.wall_time for answer in answers] for answers in rounds], axis=0)
    return sum(answer.new_tokens for answer in rounds[0]) / float(times.sum())


def report(seconds: float, workdir: Path, rows: list[Row]) -> dict:
    """What `report.json` holds."""
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
    """Of what decides speed and rounding, and the commit where there is one."""
    found = {"python": platform.python_version(), **{name: metadata.version(name) for name in _PACKAGES}}
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):  # no git, or no repository
        return found
    return found | {"commit": commit.stdout.strip()}


def table(result: dict) -> Table:
    """The report as a table for a person."""
    losses = ", ".join(f"{name} {values['clean_loss']:.3f}" for name, values in result["models"].items())
    shown = Table(title="Same text, fewer passes", caption=f"clean held-out loss, nats per token: {losses}")
    for column in ("model", "decoder", "tokens a pass", "tokens/s", "speedup", "exact"):
        shown.add_column(column, justify="left" if column in ("model", "decoder") else "right")
    for row in result["rows"]:
        shown.add_row(
            row["model"],
            row["decoder"],
            f"{row['mean_accepted_tokens']:.2f}",
            f"{row['tokens_per_second']:.0f}",
            f"{row['speedup']:.2f}x",
            f"{row['exact_share']:.0%}",
            end_section=row["decoder"] == list(drafters.DEFAULT_TREES)[-1],
        )
    return shown


def markdown(result: dict) -> str:
    """The same table for a README."""
    lines = ["| model | decoder | tokens a pass | tokens/s | speedup | exact |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {row['model']} | `{row['decoder']}` | {row['mean_accepted_tokens']:.2f} | {row['tokens_per_second']:.0f} "
        f"| {row['speedup']:.2f}x | {row['exact_share']:.0%} |"
        for row in result["rows"]
    ]
    several = any(len(values["noise_accuracy"]) > 1 for values in result["models"].values())
    behind = "right behind " + ("1, 2, ... noise tokens" if several else "a noise token")
    losses = "; ".join(
        f"{name}: clean held-out loss {values['clean_loss']:.3f} nats a token, {behind} "
        + ", ".join(f"{accuracy:.0%}" for accuracy in values["noise_accuracy"])
        for name, values in result["models"].items()
    )
    about = f"`make demo`, {result['seconds']:.0f} s on {result['hardware']}, float32, jax {result['versions']['jax']}"
    if "commit" in result["versions"]:
        about += f", commit {result['versions']['commit'][:7]}"
    return "\n".join([*lines, "", losses + ".", "", about + "."]) + "\n"


def typical(answers: Sequence[Generation]) -> Generation:
    """Of the longer half of the answers, the one with the median number of tokens a pass. Those that ended of
    themselves come first: the others repeat themselves, which is quick to draft and dull to read.
    """
    ended = [answer for answer in answers if answer.finish_reason != "length"] or answers
    longer = sorted(ended, key=lambda answer: answer.new_tokens)[len(ended) // 2 :]
    return sorted(longer, key=lambda answer: answer.mean_accepted_tokens)[len(longer) // 2]


def main() -> None:
    """Trains, decodes, prints and writes the report."""
    args = flags.FLAGS
    workdir = Path(args.workdir)
    seconds = sum(run_stage(stage, workdir) for stage in STAGES)
    began, rows = time.perf_counter(), []
    for name in MODELS:
        model = engine.load(workdir / name)
        prompts = held_out_prompts(model, get_config(name), args.prompts, args.max_new_tokens)
        print(f"\ndecoding {len(prompts)} held-out prompts with every decoder on {name}", flush=True)
        model_rows, answers = measure(name, model, prompts, args.max_new_tokens)
        rows += model_rows
    result = report(seconds + time.perf_counter() - began, workdir, rows)
    (workdir / "report.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (workdir / "report.md").write_text(markdown(result), encoding="utf-8")
    print("\nOne answer of msn with tr_jacobi; a colour is one forward pass\n")
    display.show(model.tokenizer, typical(answers))
    Console().print(table(result))
    print(f"{workdir / 'report.json'} and report.md hold these figures; {result['seconds']:.0f} s in all")


if __name__ == "__main__":
    flags.DEFINE_string("workdir", "runs/demo", "The stages' workdirs and the report go here.")
    flags.DEFINE_integer("prompts", 32, "Held-out functions to complete.", lower_bound=1)
    flags.DEFINE_integer("max_new_tokens", 256, "Limit of each answer, in tokens.", lower_bound=1)
    cli.run(main)
