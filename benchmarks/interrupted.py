"""Whether a run of `generate` that is killed again and again ends with the file of an undisturbed one.

    python -m benchmarks.interrupted --model=stories260k --prompts=prompts.jsonl --kills=10 --output=interrupted.json

The same command is started, killed (SIGKILL) a random fraction of a second behind a random answer, and started again,
as often as asked for; the last start may finish. Then the two files are compared, all fields but `wall_time`.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from absl import flags

from benchmarks import report
from msn_jax import cli


def start(args: flags.FlagValues, path: Path) -> subprocess.Popen:
    """`generate` in a process of its own, sampled, four prompts at a time."""
    command = [sys.executable, "-m", "msn_jax.generate", f"--model={args.model}", f"--prompts={args.prompts}"]
    settings = [f"--output={path}", f"--max_new_tokens={args.max_new_tokens}", "--batch_size=4", "--temperature=0.8"]
    return subprocess.Popen([*command, *settings], cwd=report.ROOT, stdout=subprocess.DEVNULL)


def answers_in(partial: Path) -> int:
    """Lines behind the first one, which says what they were made with."""
    return max(len(partial.read_text(encoding="utf-8").splitlines()) - 1, 0) if partial.exists() else 0


def timeless(path: Path) -> list[dict]:
    """The answers without how long they took."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in line.items() if name != "wall_time"} for line in lines]


def main() -> None:
    """Runs, kills, compares and writes the report."""
    args = flags.FLAGS
    rng, left = np.random.default_rng(0), []
    with tempfile.TemporaryDirectory() as directory:
        whole, broken = Path(directory) / "whole.jsonl", Path(directory) / "broken.jsonl"
        if start(args, whole).wait():
            raise RuntimeError("the undisturbed run failed")
        expected = timeless(whole)
        for answers in sorted(rng.integers(0, len(expected), args.kills).tolist()):
            process, partial = start(args, broken), Path(f"{broken}.partial")
            while process.poll() is None and answers_in(partial) < answers:
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.2))
            process.kill()
            process.wait()
            left.append(answers_in(partial))
            print(f"kill {len(left)}: {left[-1]} answers are there", flush=True)
        same = start(args, broken).wait() == 0 and timeless(broken) == expected
    result = {"answers": len(expected), "kills": len(left), "answers_after_each_kill": left, "same_file": same}
    print(result)
    report.write({**report.environment(), **result}, args.output)


if __name__ == "__main__":
    flags.DEFINE_string("model", None, "A model.", required=True)
    flags.DEFINE_string("prompts", None, "A JSONL file of prompts.", required=True)
    flags.DEFINE_integer("kills", 10, "How often.", lower_bound=1)
    flags.DEFINE_integer("max_new_tokens", 64, "Of each answer.", lower_bound=1)
    flags.DEFINE_string("output", "", "A JSON file; standard output if empty.")
    cli.run(main)
