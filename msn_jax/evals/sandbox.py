"""Runs one Python program with limits; a script of the standard library alone, started by `code_execution.py`.

    python -I sandbox.py LIMITS TOKEN_FD RESULT_FD < PROGRAM

LIMITS are JSON: {"seconds", "memory_bytes", "file_bytes"}. Before the program starts, this process gives up the network
and, if it is root, its user. When the program has run to its end, it copies the token from TOKEN_FD to RESULT_FD, so a
program that ends in any other way, such as `os._exit(0)`, does not pass. A program that searches the descriptors for
the token could: this protects from accidents, not from an attack.
"""

import ctypes
import json
import os
import resource
import signal
import sys

_NOBODY = 65534
_NEW_USER, _NEW_NETWORK = 0x10000000, 0x40000000  # flags of unshare(2)
_KEEP_CAPABILITIES = 8  # option of prctl(2)
_CAPABILITY_VERSION = 0x20080522  # of capset(2)
_READ_SEARCH = 1 << 2  # CAP_DAC_READ_SEARCH


def leave_network() -> bool:
    """Moves to an empty network namespace; False where the kernel does not permit it, or is not Linux."""
    try:
        unshare = ctypes.CDLL(None).unshare
    except (OSError, AttributeError):
        return False
    return unshare(_NEW_NETWORK) == 0 or unshare(_NEW_USER | _NEW_NETWORK) == 0


def leave_root() -> bool:
    """Becomes user `nobody`, which may read files but write none, if the process is root; False if it stays root.

    Where `nobody` cannot read Python's own files, because they are in root's home, it keeps the permission to read.
    """
    if os.geteuid() != 0:
        return True
    try:
        libc = ctypes.CDLL(None)
        libc.prctl(_KEEP_CAPABILITIES, 1, 0, 0, 0)
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)
        kept = 0 if _is_readable(os.__file__) else _READ_SEARCH
        effective_permitted_inheritable = (ctypes.c_uint32 * 6)(kept, kept, 0, 0, 0, 0)
        return libc.capset((ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0), effective_permitted_inheritable) == 0
    except (OSError, AttributeError):
        return os.geteuid() != 0


def _is_readable(path: str) -> bool:
    try:
        with open(path, "rb"):
            return True
    except OSError:
        return False


def set_limits(limits: dict) -> None:
    """Limits of memory, files, further processes and threads (none), and of the time, which ends the process."""
    seconds = limits["seconds"]
    for name, value in (
        ("RLIMIT_AS", limits["memory_bytes"]),
        ("RLIMIT_FSIZE", limits["file_bytes"]),
        ("RLIMIT_NPROC", 0),
        ("RLIMIT_CORE", 0),
        ("RLIMIT_CPU", int(seconds) + 2),
    ):
        resource.setrlimit(getattr(resource, name), (value, value))
    signal.setitimer(signal.ITIMER_REAL, seconds)


def main() -> None:
    """Runs the program from standard input."""
    limits, token_fd, result_fd = json.loads(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    read, write = os.read, os.write  # the program may replace them
    source = sys.stdin.read()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    isolation = {"network": not leave_network(), "root": not leave_root()}
    write(result_fd, json.dumps(isolation).encode() + b"\n")
    set_limits(limits)
    try:
        exec(compile(source, "program.py", "exec"), {"__name__": "__main__"})
    except BaseException as error:
        write(result_fd, f"{type(error).__name__}: {error}".encode("utf-8", "replace")[:200])
    else:
        write(result_fd, read(token_fd, 64))


if __name__ == "__main__":
    main()
