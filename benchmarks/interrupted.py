"""Whether `generate`, killed and restarted many times, writes the same file as an uninterrupted run.

    python -m benchmarks.interrupted --model=stories260k --prompts=prompts.jsonl --kills=10 --output=interrupted.json

The command is started, killed (SIGKILL) up to 0.2 seconds after a randomly chosen number of completions, and restarted,
`--kills` times; the last start may finish. The two files are then compared in all fields but `wall_time`.
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
    """Starts `generate` in its own process, with sampling and a batch size of four."""
    command = [sys.executable, "-m", "msn_jax.generate", f"--model={args.model}", f"--prompts={args.prompts}"]
    settings = [f"--output={path}", f"--max_new_tokens={args.max_new_tokens}", "--batch_size=4", "--temperature=0.8"]
    return subprocess.Popen([*command, *settings], cwd=report.ROOT, stdout=subprocess.DEVNULL)


def count_completions(partial: Path) -> int:
    """Lines of the partial file, without its header line (see `outputs.provenance`)."""
    return max(len(partial.read_text(encoding="utf-8").splitlines()) - 1, 0) if partial.exists() else 0


def without_wall_time(path: Path) -> list[dict]:
    """The completions in the file, without their wall times."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in line.items() if name != "wall_time"} for line in lines]


def main() -> None:
    """Runs, kills, compares and writes the report."""
    args = flags.FLAGS
    rng, completions_after_kill = np.random.default_rng(0), []
    with tempfile.TemporaryDirectory() as directory:
        uninterrupted, interrupted = Path(directory) / "uninterrupted.jsonl", Path(directory) / "interrupted.jsonl"
        if start(args, uninterrupted).wait():
            raise RuntimeError("the uninterrupted run failed")
        expected = without_wall_time(uninterrupted)
        for kill_after in sorted(rng.integers(0, len(expected), args.kills).tolist()):
            process, partial = start(args, interrupted), Path(f"{interrupted}.partial")
            while process.poll() is None and count_completions(partial) < kill_after:
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.2))
            process.kill()
            process.wait()
            completions_after_kill.append(count_completions(partial))
            print(f"kill {len(completions_after_kill)}: {completions_after_kill[-1]} completions written", flush=True)
        same_file = start(args, interrupted).wait() == 0 and without_wall_time(interrupted) == expected
    result = {
        "completions": len(expected),
        "kills": len(completions_after_kill),
        "completions_after_each_kill": completions_after_kill,
        "same_file": same_file,
    }
    print(result)
    report.write({**report.environment(), **result}, args.output)


if __name__ == "__main__":
    flags.DEFINE_string("model", None, "The model.", required=True)
    flags.DEFINE_string("prompts", None, "A JSONL file of prompts.", required=True)
    flags.DEFINE_integer("kills", 10, "Number of kills.", lower_bound=1)
    flags.DEFINE_integer("max_new_tokens", 64, "Limit per prompt, in tokens.", lower_bound=1)
    flags.DEFINE_string("output", "", "JSON file to write; standard output if empty.")
    cli.run(main)
