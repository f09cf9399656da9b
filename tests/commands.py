"""Runs a program many times with different arguments, but imports its modules only once."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

# One process imports everything and forks a child per command.
_DRIVER = """
import gc, importlib, json, os, runpy, sys
import grain, orbax.checkpoint, tensorflow_datasets
module = sys.argv[1]
importlib.import_module(module)
gc.freeze()  # the collector of a child would otherwise touch, and so copy, all imported objects
for number, arguments in enumerate(json.load(sys.stdin)):
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        for stream, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{number}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
        sys.argv = [module, *arguments]
        del sys.modules[module]
        runpy.run_module(module, run_name="__main__")
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def run(module: str, commands: list[list[str]], directory: Path) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of `python -m MODULE ARGUMENTS` for each list of arguments, run in `directory`."""
    process = subprocess.run(
        [sys.executable, "-c", _DRIVER, module],
        input=json.dumps(commands),
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    codes = [int(code) for code in process.stdout.split()]
    assert len(codes) == len(commands), process.stderr
    outputs = [
        [(directory / f"{number}.{name}").read_bytes().decode() for name in ("out", "err")]
        for number in range(len(codes))
    ]
    return [(code, *output) for code, output in zip(codes, outputs, strict=True)]


def assert_refused(module: str, cases: list[tuple[list[str], str]], directory: Path) -> None:
    """For every (arguments, words): the exit code is 2, and stderr is one line that contains the words."""
    results = run(module, [arguments for arguments, _ in cases], directory)
    for (arguments, words), (code, _, error) in zip(cases, results, strict=True):
        assert (code, error.count("\n"), error[:7]) == (2, 1, "error: "), (arguments, error)
        assert words in error, (arguments, error)
