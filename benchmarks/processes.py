"""Whether a training run depends on its processes and devices, or on when they are killed.

    python -m benchmarks.processes --kills=20 --terms=5 --output=processes.json

All runs are on this machine, on fake CPU devices. (1) The same run by two processes with four devices each, by one with
eight, and by one with one: the largest difference of a loss. (2) The first half by two processes, the rest by each of
the three. (3) A run of two processes, both killed (SIGKILL) or terminated (SIGTERM) at random moments and restarted,
against the undisturbed one: whether all parameters are equal, bit for bit.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from absl import flags

from benchmarks import report
from msn_jax import cli, pretrained

_LAYOUTS = {"2 processes x 4 devices": (2, 4), "1 process x 8 devices": (1, 8), "1 device": (1, 1)}
_SMALL = (
    *("--config=configs/demo.py:base", "--config.model.n_layers=1", "--config.model.vocab_size=512"),
    *("--config.data.row_length=64", "--config.data.batch_size=8", "--config.train.log_every=1"),
    "--config.train.eval_batches=1",
)


def start(workdir: Path, layout: tuple[int, int], settings: Sequence[str]) -> list[subprocess.Popen]:
    """Starts the processes of a run."""
    count, devices = layout
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    command = [sys.executable, "-m", "msn_jax.train", *settings, f"--workdir={workdir}"]
    if devices * count > 1:
        command += ["--config.mesh.data=-1", "--config.mesh.fsdp=2"]
    if count > 1:
        command += ["--distributed", f"--coordinator=localhost:{port}", f"--num_processes={count}"]
    log = (workdir.parent / f"{workdir.name}.log").open("a")
    return [
        subprocess.Popen(
            [*command, *([f"--process_id={i}"] if count > 1 else [])],
            cwd=report.ROOT,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        for i in range(count)
    ]


def finish(workdir: Path, layout: tuple[int, int], settings: Sequence[str]) -> None:
    """Makes a run, or the rest of it."""
    codes = [process.wait() for process in start(workdir, layout, settings)]
    if any(codes):
        raise RuntimeError(f"{workdir}: exit codes {codes}, see {workdir}.log")


def losses(workdir: Path) -> dict[int, list[float]]:
    """Losses by step."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return {line["step"]: [line["loss"], line["clean_loss"]] for line in lines}


def newest_step(workdir: Path) -> int:
    """The newest step in the metrics; 0 if there is none."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


def difference(one: Path, other: Path) -> float:
    """The largest difference of a loss between two runs. They must have the same steps."""
    ours, theirs = losses(one), losses(other)
    if list(ours) != list(theirs):
        raise RuntimeError(f"{one} has steps {list(ours)}, {other} {list(theirs)}")
    return max(float(np.abs(np.subtract(ours[step], theirs[step])).max()) for step in ours)


def disturb(workdir: Path, settings: Sequence[str], kills: int, terms: int, seconds: float) -> list[int]:
    """Makes a run of two processes that is killed and terminated; returns the newest step after each of them.

    Args:
      workdir: of the run.
      settings: of the run.
      kills: how often both processes are killed.
      terms: how often both are terminated.
      seconds: the longest time before that, from the first step of a start on.
    """
    rng, steps = np.random.default_rng(0), []
    signals = rng.permutation([signal.SIGKILL] * kills + [signal.SIGTERM] * terms)
    for number in signals:
        processes = start(workdir, (2, 4), settings)
        before, newest = None, newest_step(workdir)
        # A start drops the lines behind its checkpoint, then it writes new ones.
        while all(process.poll() is None for process in processes) and (before is None or newest <= before):
            before, newest = newest, newest_step(workdir)
            time.sleep(0.02)
        time.sleep(rng.uniform(0, seconds))
        for process in processes:
            process.send_signal(number)
        codes = [process.wait() for process in processes]
        expected = {-signal.SIGKILL} if number == signal.SIGKILL else {128 + signal.SIGTERM, -signal.SIGTERM}
        if not set(codes) <= expected:
            raise RuntimeError(f"{workdir}: exit codes {codes} after signal {number}, see {workdir}.log")
        steps.append(newest_step(workdir))
        print(f"{signal.Signals(number).name}: step {steps[-1]}, exit codes {codes}", flush=True)
    finish(workdir, (2, 4), settings)
    return steps


def equal_parameters(one: Path, other: Path) -> bool:
    """Whether the newest checkpoints hold the same parameters, bit for bit."""
    ours, theirs = (jax.tree.map(np.asarray, pretrained.load(path, stacked=True).params) for path in (one, other))
    return all(map(np.array_equal, *map(jax.tree.leaves, (ours, theirs))))


def main() -> None:
    """Makes all runs and writes the report."""
    args, result = flags.FLAGS, {}
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        settings = [*_SMALL, f"--config.data.data_dir={directory / 'data'}"]
        few = [*settings, f"--config.train.steps={args.steps}", f"--config.train.checkpoint_every={args.steps // 2}"]
        runs = {name: directory / str(i) for i, name in enumerate(_LAYOUTS)}
        for name, layout in _LAYOUTS.items():
            finish(runs[name], layout, few)
        reference = runs["1 device"]
        result["loss_difference"] = {name: difference(runs[name], reference) for name in _LAYOUTS}
        print(result, flush=True)
        resumed = {}
        for name, layout in _LAYOUTS.items():
            half = directory / f"half-{len(resumed)}"
            shutil.copytree(runs["2 processes x 4 devices"], half)
            shutil.rmtree(half / "checkpoints" / str(args.steps))
            finish(half, layout, few)
            resumed[name] = difference(half, reference)
        result["loss_difference_resumed"] = resumed
        print(resumed, flush=True)
        if args.kills + args.terms:
            many = [*settings, f"--config.train.steps={args.long_steps}", "--config.train.checkpoint_every=10"]
            undisturbed, disturbed = directory / "undisturbed", directory / "disturbed"
            finish(undisturbed, (2, 4), many)
            result["step_after_signal"] = disturb(disturbed, many, args.kills, args.terms, args.seconds)
            result["equal_parameters"] = equal_parameters(disturbed, undisturbed)
    print(result)
    report.write({**report.environment(), **result}, args.output)


if __name__ == "__main__":
    flags.DEFINE_integer("steps", 20, "Steps of the runs on different processes.", lower_bound=2)
    flags.DEFINE_integer("long_steps", 200, "Steps of the run that is killed.", lower_bound=10)
    flags.DEFINE_integer("kills", 20, "How often it is killed.", lower_bound=0)
    flags.DEFINE_integer("terms", 5, "How often it is terminated.", lower_bound=0)
    flags.DEFINE_float("seconds", 3.0, "Longest time from the first step of a start to the signal.", lower_bound=0.0)
    flags.DEFINE_string("output", "", "JSON file to write; standard output if empty.")
    cli.run(main)
