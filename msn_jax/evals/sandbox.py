"""Runs one Python program with limits; a script of the standard library alone, started by `code_execution.py`.

    python -s -P sandbox.py LIMITS RESULT_FD < PROGRAM

LIMITS are JSON: {"seconds", "memory_bytes", "file_bytes", "files", "open_files"}. As far as the system permits, also
without root, the program gets namespaces of its own: no network, no other process, no shared memory of others, and all
files read-only but for its empty directory, which lies in memory. It runs as `nobody` if we are root, and without
capabilities. Three processes:

  - the first makes the namespaces and waits;
  - the second, which the program cannot signal, keeps the time, writes the result to RESULT_FD, and takes whatever is
    left with it when it ends;
  - the third runs the program, and when that has come to its end, sends the second a random token, so a program that
    ends in any other way, such as `os._exit(0)`, does not pass.

The token is in the memory of the third process, though in no Python frame: a program written to search the interpreter
for it can forge its own success, but nothing else.
"""

import collections
import ctypes
import itertools
import json
import os
import resource
import secrets
import signal
import socket
import sys
import time
from collections.abc import Callable

_NOBODY = 65534
_NEW_FILES, _NEW_IPC, _NEW_USER, _NEW_PROCESSES, _NEW_NETWORK = (  # flags of unshare(2)
    *(0x00020000, 0x08000000, 0x10000000, 0x20000000, 0x40000000),
)
_NO_SUID_DEVICES, _BIND, _PRIVATE = 2 | 4, 4096 | 16384, 16384 | 1 << 18  # flags of mount(2)
_MOUNT_SETATTR, _THIS_DIRECTORY, _RECURSIVE, _READ_ONLY = 442, -100, 0x8000, 1  # of mount_setattr(2)
_PARENT_DEATH_SIGNAL, _KEEP_CAPABILITIES, _NO_NEW_PRIVILEGES = 1, 8, 38  # options of prctl(2)
_CAPABILITY_VERSION = 0x20080522  # of capset(2)
_READ_SEARCH = 1 << 2  # CAP_DAC_READ_SEARCH
_POLL_SECONDS = 0.005
_TOKEN_BYTES, _MAX_MESSAGE = 32, 1 << 10
_FAILED = 1  # exit code of a program with an exception


def isolate(limits: dict) -> dict:
    """Moves to new namespaces; the one of processes is for children only. The working directory becomes an empty one.

    Returns:
      {"network", "processes", "files"}: whether the program will reach those of the system, because the kernel does
      not permit a namespace, or is not Linux.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "unshare"):
        return {"network": True, "processes": True, "files": True}
    user, group = os.geteuid(), os.getegid()
    if user == 0:
        libc.unshare(_NEW_IPC)
    elif libc.unshare(_NEW_USER | _NEW_IPC) == 0:  # in it, this process may do the rest
        try:
            for name, text in (
                ("setgroups", "deny"),
                ("uid_map", f"{user} {user} 1"),
                ("gid_map", f"{group} {group} 1"),
            ):
                with open(f"/proc/self/{name}", "w") as file:
                    file.write(text)
        except OSError:
            pass
    return {
        "network": libc.unshare(_NEW_NETWORK) != 0,
        "processes": libc.unshare(_NEW_PROCESSES) != 0,
        "files": libc.unshare(_NEW_FILES) != 0 or not _protect_files(libc, limits),
    }


def _protect_files(libc: ctypes.CDLL, limits: dict) -> bool:
    """Makes all files read-only, and the working directory a small file system in memory; False if that failed."""
    directory = os.getcwd().encode()
    owner = os.stat(directory)
    libc.mount(None, b"/", None, _PRIVATE, None)
    _reveal_python(libc)
    attributes = (ctypes.c_uint64 * 4)(_READ_ONLY, 0, 0, 0)
    if libc.syscall(_MOUNT_SETATTR, _THIS_DIRECTORY, b"/", _RECURSIVE, attributes, ctypes.sizeof(attributes)) != 0:
        return False
    size, files = limits["files"] * limits["file_bytes"], limits["files"] + 1
    options = f"size={size},nr_inodes={files},mode=700,uid={owner.st_uid},gid={owner.st_gid}"
    is_mounted = libc.mount(b"tmpfs", directory, b"tmpfs", _NO_SUID_DEVICES, options.encode()) == 0
    os.chdir(directory)
    return is_mounted


def _reveal_python(libc: ctypes.CDLL) -> None:
    """Where Python lies in a directory that `nobody` may not enter, such as root's home: hides all else in there."""
    needed = [path for path in {sys.base_prefix, sys.prefix, *sys.path} if os.path.isdir(path)]
    closed: dict[str, list[tuple[str, int]]] = {}
    for path in needed:
        parents = [path[:i] for i in range(1, len(path)) if path[i] == "/"]
        found = next((parent for parent in parents if not os.stat(parent).st_mode & 1), None)
        if found and os.geteuid() == 0 and not any(path.startswith(f"{other}/") for other in needed):
            closed.setdefault(found, []).append((path, os.open(path, os.O_PATH)))
    for parent, paths in closed.items():
        if libc.mount(b"tmpfs", parent.encode(), b"tmpfs", _NO_SUID_DEVICES, b"size=1m,mode=755") == 0:
            for path, fd in paths:
                os.makedirs(path)
                libc.mount(f"/proc/self/fd/{fd}".encode(), path.encode(), None, _BIND, None)


def leave_root() -> bool:
    """Gives up all capabilities, and if it is root becomes `nobody`, which may write no files; False if it stays root.

    Where `nobody` cannot read Python's own files, it keeps the permission to read.
    """
    was_root = os.geteuid() == 0
    try:
        libc = ctypes.CDLL(None)
        if was_root:
            libc.prctl(_KEEP_CAPABILITIES, 1, 0, 0, 0)
            os.setgroups([])
            os.setresgid(_NOBODY, _NOBODY, _NOBODY)
            os.setresuid(_NOBODY, _NOBODY, _NOBODY)
        kept = _READ_SEARCH if was_root and not _is_readable(os.__file__) else 0
        effective_permitted_inheritable = (ctypes.c_uint32 * 6)(kept, kept, 0, 0, 0, 0)
        is_dropped = libc.capset((ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0), effective_permitted_inheritable) == 0
        libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
        libc.prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
        return is_dropped or not was_root
    except (OSError, AttributeError):
        return os.geteuid() != 0


def _is_readable(path: str) -> bool:
    try:
        with open(path, "rb"):
            return True
    except OSError:
        return False


def set_limits(limits: dict) -> None:
    """Limits of memory, files, time of the processor, further processes and threads (none)."""
    for name, value in (
        ("RLIMIT_AS", limits["memory_bytes"]),
        ("RLIMIT_FSIZE", limits["file_bytes"]),
        ("RLIMIT_NOFILE", limits["open_files"]),
        ("RLIMIT_NPROC", 0),
        ("RLIMIT_CORE", 0),
        ("RLIMIT_CPU", int(limits["seconds"]) + 2),
    ):
        resource.setrlimit(getattr(resource, name), (value, value))


def run_program(source: str, limits: dict, fd: int) -> None:
    """Runs the program in this process and ends it.

    To `fd` go two datagrams: whether this process is not root, with the token, which is answered; then the token again,
    or how the program failed.
    """
    os.setsid()
    is_user = leave_root()
    token = secrets.token_hex(_TOKEN_BYTES // 2).encode()
    os.write(fd, (b"1" if is_user else b"0") + token)
    os.read(fd, 1)
    set_limits(limits)
    steps = itertools.starmap(_call, [(_execute, source, fd), (os.write, fd, token), (os._exit, 0)])
    del token  # neither here nor in the frames of the callers, where the program could read it
    collections.deque(steps, maxlen=0)


def _call(function: Callable, *arguments: object) -> None:
    function(*arguments)


def _execute(source: str, fd: int, write: Callable = os.write, end: Callable = os._exit) -> None:
    """Runs the program; one that raises an exception ends here. It may replace the functions of `os`."""
    try:
        exec(compile(source, "program.py", "exec"), {"__name__": "__main__"})
    except BaseException as error:
        write(fd, f"{type(error).__name__}: {error}".encode("utf-8", "replace")[:200])
        end(_FAILED)


def supervise(source: str, limits: dict, isolation: dict, result_fd: int) -> None:
    """Starts the program, ends it when its time is over, and writes two lines of JSON: isolation and outcome."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "prctl"):
        libc.prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    has_own_proc = os.getpid() != 1 or libc.mount(b"proc", b"/proc", b"proc", _NO_SUID_DEVICES, None) == 0
    if not has_own_proc:  # the program sees the processes of the system in /proc, and its number there is another's
        isolation = isolation | {"processes": True}
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    program = os.fork()
    if program == 0:
        os.close(result_fd)
        ours.close()
        run_program(source, limits, theirs.detach())
    begun = ours.recv(1 + _TOKEN_BYTES)
    os.write(result_fd, json.dumps(isolation | {"root": begun[:1] != b"1"}).encode() + b"\n")
    ours.send(b"1")
    began = time.monotonic()
    while (ended := os.waitpid(program, os.WNOHANG)) == (0, 0):
        seconds = time.monotonic() - began
        if seconds > limits["seconds"]:
            in_queue = _seconds_in_queue(program) if has_own_proc else 0.0
            if seconds - in_queue > limits["seconds"]:
                break
        time.sleep(_POLL_SECONDS)
    if ended == (0, 0):
        os.kill(program, signal.SIGKILL)
        outcome = {"passed": False, "reason": "timed out"}
    else:
        outcome = _outcome(os.waitstatus_to_exitcode(ended[1]), ours, begun[1:])
    os.write(result_fd, json.dumps(outcome).encode() + b"\n")


def _seconds_in_queue(process: int) -> float:
    """The time for which a process has waited for a processor, on Linux: a busy machine does not fail a program."""
    try:
        with open(f"/proc/{process}/schedstat") as file:
            return int(file.read().split()[1]) * 1e-9
    except (OSError, IndexError):
        return 0.0


def _outcome(code: int, proof: socket.socket, token: bytes) -> dict:
    proof.setblocking(False)
    try:
        message = proof.recv(_MAX_MESSAGE)
    except BlockingIOError:
        message = b""
    if message == token and code == 0:
        return {"passed": True, "reason": "passed"}
    if code == -signal.SIGXCPU:
        return {"passed": False, "reason": "timed out"}
    reason = message.decode("utf-8", "replace") if code == _FAILED else ""
    return {"passed": False, "reason": reason or f"ended with code {code}"}


def main() -> None:
    """Runs the program from standard input."""
    limits, result_fd = json.loads(sys.argv[1]), int(sys.argv[2])
    source = sys.stdin.read()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    isolation = isolate(limits)
    supervisor = os.fork()
    if supervisor == 0:
        supervise(source, limits, isolation, result_fd)
        os._exit(0)
    os.waitpid(supervisor, 0)


if __name__ == "__main__":
    main()
