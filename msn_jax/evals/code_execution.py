"""Runs generated programs, each in its own process, session and empty directory (`sandbox.py`)."""

import contextlib
import dataclasses
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

_SCRIPT = Path(__file__).with_name("sandbox.py")
_START_SECONDS = 60.0  # to start Python, on a busy machine
_NOBODY = 65534
_MEMORY_BYTES = 1 << 30
_FILE_BYTES = 1 << 20
_MAX_RESULT = 1 << 12  # bytes


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a program."""

    passed: bool  # it ran to its end
    reason: str  # 'passed', 'timed out', or how it failed
    isolation: dict  # {"network": whether it had one, "root": whether it ran as root}


def run(program: str, seconds: float) -> Outcome:
    """Runs a program and kills whatever it has started.

    It passes if it runs to its end, its tests included. A random token proves this; exit codes and output do not.

    Args:
      program: Python source.
      seconds: limit of its time, not counting the start of Python.

    Raises:
      RuntimeError: Python did not start, which says nothing about the program.
    """
    limits = json.dumps({"seconds": seconds, "memory_bytes": _MEMORY_BYTES, "file_bytes": _FILE_BYTES})
    token = secrets.token_hex(16).encode()
    token_read, token_write = os.pipe()
    result_read, result_write = os.pipe()
    os.write(token_write, token)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory, contextlib.ExitStack() as stack:
        for fd in (token_read, token_write, result_read, result_write):
            stack.callback(os.close, fd)
        if os.geteuid() == 0:
            os.chown(directory, _NOBODY, _NOBODY)
        process = subprocess.Popen(
            [sys.executable, "-I", str(_SCRIPT), limits, str(token_read), str(result_write)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=directory,
            env={"PATH": os.defpath, "PYTHONHASHSEED": "0", "PYTHONUTF8": "1"},
            pass_fds=(token_read, result_write),
            start_new_session=True,
        )
        try:
            process.communicate(program.encode("utf-8", "replace"), timeout=seconds + _START_SECONDS)
        except subprocess.TimeoutExpired:
            pass
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        os.set_blocking(result_read, False)
        with contextlib.suppress(BlockingIOError):
            return _outcome(os.read(result_read, _MAX_RESULT), token, process.returncode)
    raise RuntimeError(f"{sys.executable} did not start a program within {_START_SECONDS:.0f} seconds")


def _outcome(result: bytes, token: bytes, returncode: int) -> Outcome:
    first, _, rest = result.partition(b"\n")
    isolation = json.loads(first)
    if rest == token and returncode == 0:
        return Outcome(True, "passed", isolation)
    if returncode in (-signal.SIGALRM, -signal.SIGXCPU, -signal.SIGKILL):
        return Outcome(False, "timed out", isolation)
    return Outcome(False, rest.decode("utf-8", "replace") or f"ended with code {returncode}", isolation)
