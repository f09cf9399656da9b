"""The whole idea on this machine, in ten minutes: `make demo`.

1. A real chat model, SmolLM2-135M-Instruct, answers a dozen questions with every decoder (`smollm.py`), and again with
   a gated adapter that drafts for it.
2. Two small models are trained from the same base, on the interpreter's own standard library, with the same data and
   the same number of steps: `sft`, the control, and `msn`, trained on noisy inputs. Both complete held-out functions
   with every decoder.

A table compares the decoders (`comparison.py`). The numbers of tokens, steps and prompts follow from a measurement of
this machine's speed, so that the demo takes --minutes. A second call reuses finished stages. Runs from a checkout and
uses its `configs/demo.py` and `configs/demo_questions.jsonl`.
"""

import dataclasses
import json
import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import jax
import numpy as np
from absl import flags
from rich.console import Console

from configs import demo as configs
from msn_jax import cli, comparison, environment, held_out, json_files, metrics, request_files, smollm
from msn_jax.cli import InputError
from msn_jax.comparison import Row
from msn_jax.decode import display, engine, models
from msn_jax.decode.engine import Generation
from msn_jax.decode.models import Model
from msn_jax.decode.request import Request

STAGES = ("base", "sft", "msn")
MODELS = ("sft", "msn")
QUESTIONS = Path(configs.__file__).with_name("demo_questions.jsonl")
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
# Large pages for the buffers of a training step; zeroing small pages takes a quarter of a step on a CPU. glibc's
# allocator reads this when a process starts; other allocators ignore it.
_ALLOCATOR = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}

_REAL_SECONDS = 110  # of part 1, on a machine of any speed
_REAL_TOKENS = (16, 64)  # of one answer, at least and at most
# The time that all decoders, with and without the adapter, need for one token each, in forward passes over one token.
_PASSES_PER_TOKEN = 11.5
_ADAPTED_DECODERS = ("autoregressive", "jacobi")
_MSN_STEP = 1.8  # time of a training step of `msn`, in steps of `base`
_MIN_STEPS = 100
_TRAINING_SHARE = 0.7  # of the time that is left after `base`; the rest is for decoding
_ROUNDS = 3  # timed completions per prompt


class Clock:
    """Seconds since the demo began, and until its limit."""

    def __init__(self, limit: float):
        """Starts the clock."""
        self._began, self._limit = time.perf_counter(), limit

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._began

    @property
    def left(self) -> float:
        """Seconds until the limit, at least 0."""
        return max(self._limit - self.elapsed, 0.0)


def compare_on_real_model(clock: Clock) -> tuple[list[Row], list[dict]]:
    """Part 1: table and one answer of a real model; neither if it cannot be fetched, which one line says."""
    try:
        smollm.prepare(Path(smollm.DIRECTORY))
        model = models.load(smollm.DIRECTORY)
        adapted = models.attach(model, smollm.ADAPTER)
    except InputError as error:
        print(f"part 1, the real model, is left out: {error}", flush=True)
        return [], []
    questions = [request.prompt for request in request_files.read(str(QUESTIONS), Request("")).values()]
    fewest = _REAL_TOKENS[0]
    print(f"\ncompiling {len(comparison.DECODERS)} decoders for SmolLM2-135M-Instruct", flush=True)
    comparison.compile_decoders(model, questions, fewest)  # the same programs serve all limits up to `_REAL_TOKENS[1]`
    comparison.compile_decoders(adapted, questions, fewest, _ADAPTED_DECODERS)
    [timed] = engine.generate(model, questions[-1:], "autoregressive", fewest)
    count = real_tokens(timed.wall_time / timed.new_tokens, len(questions), _REAL_SECONDS - clock.elapsed)
    print(f"decoding {len(questions)} questions, {count} tokens each, with every decoder", flush=True)
    rows, generations = comparison.measure("smollm2", model, questions, count, rounds=1)
    rows += comparison.measure("smollm2, adapter", adapted, questions, count, 1, decoders=_ADAPTED_DECODERS)[0]
    print("\nOne answer with auto; each colour change is a forward pass\n")
    shown = comparison.typical(generations["auto"])
    display.show(model.tokenizer, shown)
    Console().print(comparison.to_table([dataclasses.asdict(row) for row in rows]))
    return rows, [to_answer("smollm2", model, shown)]


def to_answer(name: str, model: Model, generation: Generation) -> dict:
    """A shown output for `report.json`, with the text of each forward pass."""
    passes = display.by_pass(model.tokenizer, generation)
    return {"model": name, "decoder": generation.decoder, "prompt": generation.prompt, "passes": passes}


def real_tokens(seconds_per_token: float, num_questions: int, seconds: float) -> int:
    """Tokens of one answer, so that all answers of part 1 take about this long."""
    count = seconds / (num_questions * _PASSES_PER_TOKEN * seconds_per_token)
    return int(np.clip(count, *_REAL_TOKENS))


def run_stage(stage: str, workdir: Path, steps: int | None = None) -> float:
    """Trains one stage with the public program and prints the command; returns the seconds that it took."""
    command = [sys.executable, "-m", "msn_jax.train", f"--config=configs/demo.py:{stage}"]
    command.append(f"--workdir={workdir / stage}")
    if stage != "base":
        command += [f"--config.train.init_from={workdir / 'base'}", f"--config.train.steps={steps}"]
    settings = [f"{name}={value}" for name, value in _ALLOCATOR.items()]
    print("\n$ " + " ".join([*settings, "python", *command[1:]]), flush=True)
    began = time.perf_counter()
    finished = subprocess.run(command, env=os.environ | _ALLOCATOR, check=False)
    if finished.returncode:
        sys.exit(finished.returncode)
    return time.perf_counter() - began


def plan_steps(workdir: Path, base_seconds: float, seconds_left: float) -> int:
    """Training steps of `sft` and `msn`, so that both, and then the decoding, fit into the time that is left.

    The number is stored in the workdir, where it stays: a later call continues the same runs.
    """
    path = workdir / "plan.json"
    if not path.exists():
        base = configs.get_config("base")
        lines = [json.loads(line) for line in (workdir / "base" / "metrics.jsonl").read_text().splitlines()]
        rate = np.median([line["tokens_per_second"] for line in lines if "tokens_per_second" in line])
        step_seconds = base.data.batch_size * base.data.row_length / float(rate)
        overhead = max(base_seconds - base.train.steps * step_seconds, 0.0)  # of a stage: start, compilation, data
        steps = (_TRAINING_SHARE * seconds_left - 2 * overhead) / (step_seconds * (1 + _MSN_STEP))
        most = configs.get_config("msn").train.steps
        path.write_bytes(json_files.dump({"steps": int(np.clip(steps, _MIN_STEPS, most))}))
    return json_files.read(path)["steps"]


def report(seconds: float, steps: int, workdir: Path, rows: list[Row], answers: list[dict]) -> dict:
    """The content of `report.json`."""
    final = {name: metrics.final_metrics(workdir / name) for name in MODELS}
    about = environment.environment()
    return {
        "command": about["command"],
        "date": about["date"],
        "hardware": hardware(),
        "versions": versions(),
        "seconds": seconds,
        "steps": steps,
        "models": {
            name: {"clean_loss": values["eval_clean_loss"], "noise_accuracy": values["eval_noise_accuracy"]}
            for name, values in final.items()
        },
        "rows": [dataclasses.asdict(row) for row in rows],
        "answers": answers,
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


def to_markdown(result: dict) -> str:
    """The report in Markdown."""
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
    lines = comparison.to_markdown(result["rows"])
    return "\n".join([*lines, "", f"{result['steps']} training steps. {losses}.", "", about + "."]) + "\n"


def main() -> None:
    """Compares the decoders on the real model, trains, compares them on the small models, and writes the report."""
    args = flags.FLAGS
    workdir = cli.make_directory(args.workdir, "--workdir")
    clock = Clock(60 * args.minutes)
    rows, answers = compare_on_real_model(clock)
    base_seconds = run_stage("base", workdir)
    steps = plan_steps(workdir, base_seconds, clock.left)
    for stage in STAGES[1:]:
        run_stage(stage, workdir, steps)
    for number, name in enumerate(MODELS):
        model = models.load(workdir / name)
        prompts = held_out.prompts(model, configs.get_config(name).data, args.prompts, args.max_new_tokens)
        print(f"\ndecoding {len(prompts)} held-out prompts with every decoder on {name}", flush=True)
        comparison.compile_decoders(model, prompts, args.max_new_tokens)
        seconds = clock.left / (len(MODELS) - number)
        model_rows, generations = comparison.measure(name, model, prompts, args.max_new_tokens, _ROUNDS, seconds)
        rows += model_rows
    shown = comparison.typical(generations["tr_jacobi"])
    answers.append(to_answer(name, model, shown))
    result = report(clock.elapsed, steps, workdir, rows, answers)
    (workdir / "report.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (workdir / "report.md").write_text(to_markdown(result), encoding="utf-8")
    print("\nOne completion of msn with tr_jacobi; each colour change is a forward pass\n")
    display.show(model.tokenizer, shown)
    display.save_svg(model.tokenizer, shown, workdir / "output.svg")
    losses = ", ".join(f"{name} {values['clean_loss']:.3f}" for name, values in result["models"].items())
    Console().print(comparison.to_table(result["rows"], f"clean held-out loss, nats per token: {losses}"))
    print(f"{workdir / 'report.json'} and report.md hold these figures; {result['seconds']:.0f} s in total")


if __name__ == "__main__":
    flags.DEFINE_string("workdir", "runs/demo", "Directory for the stages' workdirs and the report.")
    flags.DEFINE_float("minutes", 8.5, "About how long the demo takes, if the machine is fast enough.", lower_bound=0)
    flags.DEFINE_integer("prompts", 32, "Held-out functions to complete.", lower_bound=1)
    flags.DEFINE_integer("max_new_tokens", 256, "Limit of each completion, in tokens.", lower_bound=1)
    cli.run(main)
