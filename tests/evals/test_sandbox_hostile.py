"""Hostile programs: every one fails within its limits and leaves nothing behind.

An object that equals everything passes where a test compares only with `==`: that is the protocol's, not ours.
"""

import os
import secrets
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from msn_jax.evals import code_execution

SECONDS = 1.0
_OUTSIDE = "/tmp", "/var/tmp", "/dev/shm"

# {mark} is a name of this run's own, {victim} a file that anybody may write, in a directory that anybody may write.
PROGRAMS = {
    "endless loop": "while True: pass",
    "sleep": "import time\ntime.sleep(1000)",
    "ignores all signals": """
import signal, time
for number in range(1, 65):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
signal.setitimer(signal.ITIMER_REAL, 0)
while True: time.sleep(0.1)""",
    "fork bomb": "import os\nwhile True: os.fork()",
    "thread bomb": "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(1000,)).start()",
    "memory bomb": "a = [0]\nwhile True: a += a",
    "recursion": "def f(): return f() + 1\nf()",
    "deep recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef f(*a): return f(*map(f, a), f())\nf(1)",
    "open files": "files = []\nwhile True: files.append(open('file', 'w'))",
    "many files": "n = 0\nwhile True:\n    n += 1\n    open(str(n), 'w').close()",
    "big file": "with open('file', 'wb') as file:\n    while True: file.write(bytes(1 << 20))",
    "big files": "n = 0\nwhile True:\n    n += 1\n    open(str(n), 'wb').write(bytes(1 << 20))",
    "fills /tmp": "while True: open('/tmp/{mark}', 'ab').write(bytes(1 << 20))",
    "fills /dev/shm": "while True: open('/dev/shm/{mark}', 'ab').write(bytes(1 << 20))",
    "shared memory": """
import ctypes
libc = ctypes.CDLL(None)
while libc.shmget(int('{mark}', 16), 1 << 20, 0o1666) >= 0: int('{mark}', 16)
raise SystemExit""",
    "floods the output": """
import os, sys
while True:
    os.write(1, bytes(1 << 20))
    os.write(2, bytes(1 << 20))""",
    "connects": "import socket\nsocket.create_connection(('127.0.0.1', {port}), 5)",
    "sends a datagram": """
import socket
socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', {datagram_port}))""",
    "listens": "import socket\nserver = socket.create_server(('0.0.0.0', 0))\nserver.accept()",
    "deletes": "import os\nos.remove('{victim}')",
    "deletes a tree": "import shutil, os\nshutil.rmtree(os.path.dirname('{victim}'))",
    "writes elsewhere": "open('{victim}', 'w').write('x')",
    "writes above": "open('../{mark}', 'w').write('x')",
    "writes through a link": "import os\nos.symlink('{victim}', 'link')\nopen('link', 'w').write('x')",
    "renames a link": """
import os
os.symlink('/tmp', 'link')
open('file', 'w').close()
os.rename('file', 'link/{mark}')""",
    "reads the environment of others": """
import glob
found = False
for path in glob.glob('/proc/[0-9]*/environ'):
    try: found |= '{secret}' in open(path).read()
    except OSError: pass
assert found""",
    "reads secrets": "print(open('/etc/shadow').read())",
    "kills its parent": "import os\nos.kill(os.getppid(), 9)\nos._exit(0)",
    "stops its parent": "import os, signal\nos.kill(os.getppid(), signal.SIGSTOP)\nos._exit(0)",
    "kills the evaluation": "import os\nos.kill({pid}, 9)\nos._exit(0)",
    "kills its group": "import os\nos.killpg(0, 9)",
    "kills all": "import os\nos.kill(-1, 9)\nos._exit(0)",
    "traces its parent": """
import ctypes, os
libc = ctypes.CDLL(None)
assert libc.ptrace(16, os.getppid(), None, None) == 0""",
    "writes into the memory of its parent": "import os\nopen(f'/proc/{{os.getppid()}}/mem', 'r+b')",
    "reads the memory of its parent": """
import ctypes, os
libc, found = ctypes.CDLL(None), ctypes.create_string_buffer(8)
here, there = ((ctypes.c_size_t * 2)(address, 8) for address in (ctypes.addressof(found), id(None)))
assert libc.process_vm_readv(os.getppid(), here, 1, there, 1, 0) == 8""",
    "os._exit": "import os\nos._exit(0)",
    "sys.exit": "import sys\nsys.exit(0)",
    "exit": "exit()",
    "SystemExit in the test": "def check(f): f()\ndef f(): raise SystemExit(0)\ncheck(f)",
    "patches the test": "import sys\nclass F:\n    def __call__(self): sys.modules.clear(); raise SystemExit\nF()()",
    "patches exit": "import builtins, os\nbuiltins.exit = os._exit\nexit(0)",
    "patches AssertionError": """
import builtins
builtins.AssertionError = type('E', (BaseException,), {{'__init__': lambda self: None}})
assert False""",
    "exits at exit": "import atexit, os\natexit.register(os._exit, 0)\nassert False",
    "exits in a hook": "import os, sys\nsys.excepthook = sys.unraisablehook = lambda *_: os._exit(0)\nassert False",
    "exits in a trace": "import os, sys\nsys.settrace(lambda *_: os._exit(0))\n(lambda: 1)()",
    "becomes another program": "import os\nos.execv('/bin/true', ['true'])",
    "a child outlives it": """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0: time.sleep(1000)
os._exit(0)""",
    "forges a result": """
import os
for fd in range(3, 256):
    for message in (b'passed', b'{{"passed": true, "reason": "passed"}}\\n'):
        try: os.write(fd, message)
        except OSError: pass
os._exit(0)""",
    "sends back what it reads": """
import os
found = []
for fd in range(256):
    try:
        os.set_blocking(fd, False)
        found.append(os.read(fd, 1 << 12))
    except OSError: pass
for fd in range(3, 256):
    for message in found:
        try: os.write(fd, message)
        except OSError: pass
os._exit(0)""",
    "searches the frames": """
import os, sys
frame, found = sys._getframe(), []
while frame:
    found += [value for value in frame.f_locals.values() if isinstance(value, bytes)]
    frame = frame.f_back
for message in found:
    for fd in range(3, 256):
        try: os.write(fd, message)
        except OSError: pass
os._exit(0)""",
    "closes all": "import os\nos.closerange(0, 256)",
    "raises its limits": """
import resource
resource.setrlimit(resource.RLIMIT_NPROC, (1000, 1000))
__import__('os').fork()""",
    "becomes root": "import os\nos.setuid(0)",
    "mounts": "import ctypes\nassert ctypes.CDLL(None).mount(b'tmpfs', b'/tmp', b'tmpfs', 0, None) == 0",
}


# What these programs reach where the system does not permit a namespace (`Outcome.isolation`).
NEEDS = {"connects": "network", "sends a datagram": "network", "reads the environment of others": "processes"}


@pytest.fixture(scope="module")
def secret():
    """A text in the environment of another process, which lives as long as the tests."""
    text = secrets.token_hex(8)
    command = [sys.executable, "-c", "print(flush=True)\ninput()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={"SECRET": text}) as process:
        process.stdout.readline()  # it has begun
        yield text
        process.kill()


@pytest.fixture(scope="module")
def sockets():
    """A server that is connected to by anybody, and a socket for datagrams."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(type=socket.SOCK_DGRAM) as datagrams:
        datagrams.bind(("127.0.0.1", 0))
        yield server, datagrams


def _is_left(seconds: float) -> bool:
    """Whether a process of the run with this limit, which no other run has, is left."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if f'"seconds": {seconds}' in path.read_text():
                return True
        except OSError:
            pass
    return False


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_hostile_program_fails_and_leaves_nothing(name, tmp_path, secret, sockets):
    mark, seconds = secrets.token_hex(3), SECONDS + secrets.randbelow(1 << 30) * 1e-12
    victim = tmp_path / "open" / "victim"
    victim.parent.mkdir()
    victim.write_text("kept")
    for path in (victim.parent, victim):
        path.chmod(stat.S_IRWXU | stat.S_IRWXG | stat.S_IRWXO)
    port, datagram_port = (each.getsockname()[1] for each in sockets)
    values = {"mark": mark, "victim": victim, "pid": os.getpid(), "secret": secret}
    values |= {"port": port, "datagram_port": datagram_port}
    began = time.monotonic()
    outcome = code_execution.run(PROGRAMS[name].format(**values), seconds)
    assert time.monotonic() - began < SECONDS + 90, outcome
    assert not outcome.passed or outcome.isolation.get(NEEDS.get(name)), outcome
    assert outcome.reason != "ended the process that supervised it" or outcome.isolation["processes"]
    assert not _is_left(seconds)
    if not outcome.isolation["files"]:
        assert victim.read_text() == "kept" and list(victim.parent.iterdir()) == [victim]
        assert not [place for place in _OUTSIDE if Path(place, mark).exists()]
    if Path("/proc/sysvipc/shm").exists():
        assert str(int(mark, 16)) not in Path("/proc/sysvipc/shm").read_text().split()
