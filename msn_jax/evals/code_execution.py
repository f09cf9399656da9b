"""Runs generated programs, each in its own process, session and empty directory (`sandbox.py`)."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

_SCRIPT = Path(__file__).with_name("sandbox.py")
_START_SECONDS = 60.0  # to start Python, on a busy machine
_NOBODY = 65534
_LIMITS = {"memory_bytes": 1 << 30, "file_bytes": 1 << 20, "files": 32, "open_files": 256}
_MAX_RESULT = 1 << 12  # bytes
# All that a program sees: sets have the same order in every run. NumPy, which some tests use, may start no threads.
_ENVIRONMENT = {"PATH": os.defpath, "PYTHONHASHSEED": "0", "PYTHONUTF8": "1", "OPENBLAS_NUM_THREADS": "1"}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a program."""

    passed: bool  # it ran to its end
    reason: str  # 'passed', 'timed out', or how it failed
    isolation: dict  # whether it had: {"network", "processes", "files"} of the system, "root"


def run(program: str, seconds: float) -> Outcome:
    """Runs a program and kills whatever it has started.

    It passes if it runs to its end, its tests included. A random token proves this; exit codes and output do not.

    Args:
      program: Python source.
      seconds: limit of its time, not counting the start of Python and, on Linux, the wait for a processor.

    Raises:
      RuntimeError: Python did not start, which says nothing about the program.
    """
    limits = json.dumps(_LIMITS | {"seconds": seconds})
    result_read, result_write = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory, contextlib.ExitStack() as stack:
        for fd in (result_read, result_write):
            stack.callback(os.close, fd)
        if os.geteuid() == 0:
            with contextlib.suppress(OSError):  # a container in which there is no `nobody`
                os.chown(directory, _NOBODY, _NOBODY)
        process = subprocess.Popen(
            [sys.executable, "-s", "-P", str(_SCRIPT), limits, str(result_write)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=directory,
            env=_ENVIRONMENT,
            pass_fds=(result_write,),
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
            return _outcome(os.read(result_read, _MAX_RESULT))
    raise RuntimeError(f"{sys.executable} did not start a program within {_START_SECONDS:.0f} seconds")


def _outcome(result: bytes) -> Outcome:
    isolation, *outcome = [json.loads(line) for line in result.splitlines()]
    if not outcome:
        return Outcome(False, "ended the process that supervised it", isolation)
    return Outcome(outcome[0]["passed"], outcome[0]["reason"], isolation)
