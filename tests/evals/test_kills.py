"""A program that is killed at any moment, and started again, leaves the files of an undisturbed one."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import commands
import pytest
import runs
import tiny

pytestmark = pytest.mark.usefixtures("quick_compilation")

KILLS = 2
_TIMES = ("time", "tstamp", "wall_time", "load_average")

# One process imports everything, and forks a child per run: the first one is undisturbed, the others, which continue
# each other, are killed when their log has grown to a random share of the first one's bytes, except the last one.
_DRIVER = """
import json, os, runpy, signal, sys, time
import msn_jax.evaluate
whole, log, shares = None, "out/samples.jsonl", json.load(sys.stdin)
for share in [None, *shares, None]:
    child = os.fork()
    if child == 0:
        sys.argv = ["msn_jax.evaluate", *sys.argv[1:], "--output=out"]
        del sys.modules["msn_jax.evaluate"]
        runpy.run_module("msn_jax.evaluate", run_name="__main__")
        os._exit(0)
    ended, began = (0, 0), time.monotonic()
    if share is not None:
        while ended == (0, 0) and (not os.path.exists(log) or os.path.getsize(log) < share * whole):
            if time.monotonic() > began + 300:
                os.kill(child, signal.SIGKILL)
                sys.exit(f"the log has not grown to {share} of {whole} bytes")
            time.sleep(0.001)
            ended = os.waitpid(child, os.WNOHANG)
        if ended == (0, 0):
            os.kill(child, signal.SIGKILL)
    ended = os.waitpid(child, 0) if ended == (0, 0) else ended
    print(os.waitstatus_to_exitcode(ended[1]), file=sys.stderr, flush=True)
    if whole is None:
        whole = os.path.getsize(log)
        os.rename("out", "whole")
"""


def evaluate(directory: Path, flags: list[str], kills: int) -> list[int]:
    """The exit codes of an undisturbed run, whose output becomes `whole`, and of `kills` + 1 others, whose is `out`."""
    shares = sorted(random.Random(str(directory)).uniform(0, 0.95) for _ in range(kills))
    process = subprocess.run(
        [sys.executable, "-c", _DRIVER, *flags],
        input=json.dumps(shares),
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(commands.ROOT)},
        capture_output=True,
        text=True,
    )
    codes = [int(line) for line in process.stderr.splitlines() if line.lstrip("-").isdigit()]
    assert len(codes) == kills + 2, process.stderr
    return codes


def content(directory: Path) -> dict[str, object]:
    """The files of an output, by name, without times."""
    files = {}
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        lines = [path.read_text()] if path.suffix == ".json" else path.read_text().splitlines()
        files[str(path.relative_to(directory))] = [_without_times(json.loads(line)) for line in lines]
    return files


def _without_times(value: object) -> object:
    if isinstance(value, dict):
        return {name: _without_times(item) for name, item in value.items() if name not in _TIMES}
    return [_without_times(item) for item in value] if isinstance(value, list) else value


def test_killed_runs_leave_the_files_of_an_undisturbed_one(tmp_path):
    tiny.write_model(tmp_path / "model", max_length=256, n_layers=1)
    lines = [runs.line(i, ("math", "writing")[i % 2], [f"the cat {i}", "sat on"]) for i in range(8)]
    runs.write_lines(tmp_path / "question.jsonl", lines)
    flags = ["--model=model", "--suite=mt_bench", "--data=question.jsonl", "--max_new_tokens=4", "--seed=1"]
    flags.append("--decoders=tr_jacobi")
    codes = evaluate(tmp_path, flags, KILLS)
    assert codes[0] == codes[-1] == 0 and -signal.SIGKILL in codes
    whole = content(tmp_path / "whole")
    assert set(whole) == {"samples.jsonl", "report.json", "answers/tr_jacobi.jsonl"}
    assert len(whole["samples.jsonl"]) == 1 + 2 * 8
    assert content(tmp_path / "out") == whole
