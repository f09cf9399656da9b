"""Runs launchers in subprocesses, with stubs of the programs that they call."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
AWKWARD = ["it's", 'say "hi"', "two  spaces", "$HOME", "`date`", "$(id)", "back\\slash", "*", "#", "a;b&&c", ""]
# Saves on SIGTERM as the train program does; meanwhile it takes any argument. Ends after ten seconds.
TRAIN = """\
import os, pathlib, signal, sys, time
def save(*_):
    time.sleep(0.2)
    os.write(1, b"saved\\n")  # a line at a time: two tasks share the log
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
os.write(1, b"started\\n")
time.sleep(10)
"""


def launch(script: str, *arguments: str, root: Path = REPOSITORY, **env: str) -> subprocess.CompletedProcess:
    argv = [sys.executable, str(root / "launch" / script), *arguments]
    return subprocess.run(argv, capture_output=True, text=True, env=os.environ | env, timeout=30)


def dry_run(script: str, *arguments: str, root: Path = REPOSITORY) -> str:
    result = launch(script, *arguments, "--dry_run", root=root)
    assert result.returncode == 0, result.stderr
    return result.stdout


def make_home(home: Path) -> Path:
    """The home directory of a remote host after `setup`."""
    environment = home / "msn_jax/.venv/bin"
    environment.mkdir(parents=True)
    (environment / "activate").write_text("export IN_VENV=yes\n")
    return home


def write_stub(folder: Path, name: str, script: str) -> None:
    """An executable whose arguments are appended to `folder`/../calls before `script` runs."""
    folder.mkdir(exist_ok=True)
    record = f'printf \'%s\\0\' {name} "$@" >>"{folder.parent}/calls"\necho >>"{folder.parent}/calls"\n'
    path = folder / name
    path.write_text(f"#!/bin/sh\n{record}{script}\n")
    path.chmod(0o755)


def calls(folder: Path) -> list[list[str]]:
    """The command lines of the stubs in `folder` that ran, in order."""
    record = folder.parent / "calls"
    return [line.split("\0")[:-1] for line in record.read_text().splitlines()] if record.exists() else []


def wait_for(condition: Callable[[], object], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.02)


def imports_jax(module: str) -> bool:
    code = f"import sys; sys.path.insert(0, 'launch'); import {module}; print('jax' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return result.stdout == "True\n"
