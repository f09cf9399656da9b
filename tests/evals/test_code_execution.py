"""Programs under test: which pass, which do not, and what they cannot do."""

import os
import shutil
import subprocess

import pytest

from msn_jax.evals import code_execution

SECONDS = 30.0  # far more than a program needs, for busy machines


@pytest.mark.parametrize(
    "program",
    [
        "assert 1 + 1 == 2",
        "import math, re, collections, decimal, hashlib\nassert math.gcd(4, 6) == 2",
        "print('much ' * 100000)\nassert __name__ == '__main__'",
        "open('file', 'w').write('x')\nassert open('file').read() == 'x'",
        "import os\nassert os.listdir('.') == []",
        "def f(n): return n and f(n - 1)\nassert f(500) == 0",
    ],
)
def test_programs_that_pass(program):
    outcome = code_execution.run(program, SECONDS)
    assert (outcome.passed, outcome.reason) == (True, "passed")


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("assert 1 + 1 == 3, 'no'", "AssertionError: no"),
        ("def f(:", "SyntaxError"),
        ("import os\nos._exit(0)", "ended with code 0"),
        ("import sys\nsys.exit(0)", "SystemExit: 0"),
        ("import os, sys\nsys.exit = os._exit\nsys.exit(0)", "ended with code 0"),
        ("import atexit, os\natexit.register(os._exit, 0)\nassert False", "AssertionError"),
        ("import os, sys\nsys.excepthook = lambda *_: os._exit(0)\nassert False", "AssertionError"),
        ("import builtins\nbuiltins.AssertionError = type('E', (Exception,), {})\nassert False", "AssertionError"),
        ("import os\nfor fd in range(3, 20):\n  try: os.write(fd, b'passed')\n  except OSError: pass\nos._exit(0)", ""),
        ("print('passed')\nraise KeyboardInterrupt", "KeyboardInterrupt"),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)", "ended with code -11"),
        ("raise ValueError('\\ud800')", "ValueError: ?"),
        ("x = bytearray(1 << 32)", "MemoryError"),
        ("open('file', 'wb').write(b'x' * (1 << 22))", "OSError: [Errno 27]"),
        ("input()", "EOFError"),
        ("import os\nassert os.environ.get('HOME') is None\nassert not os.listdir('/nowhere')", "FileNotFoundError"),
    ],
)
def test_programs_that_fail(program, reason):
    outcome = code_execution.run(program, SECONDS)
    assert not outcome.passed
    assert outcome.reason.startswith(reason), outcome.reason


@pytest.mark.parametrize(
    "program",
    ["while True: pass", "import time\ntime.sleep(60)", "import signal\nsignal.alarm(0)\nwhile True: pass"],
)
def test_a_program_that_does_not_end_is_killed(program, monkeypatch):
    monkeypatch.setattr(code_execution, "_START_SECONDS", 5.0)
    outcome = code_execution.run(program, 1.0)
    assert (outcome.passed, outcome.reason) == (False, "timed out")


def test_a_program_starts_no_processes_and_no_threads():
    code = "import os\ntry: os.fork()\nexcept OSError: pass\nelse: assert False, 'forked'"
    outcome = code_execution.run(code, SECONDS)
    if not outcome.isolation["root"]:
        assert outcome.passed, outcome.reason
        code = "import threading\ntry: threading.Thread(target=print).start()\nexcept RuntimeError: pass\n"
        assert code_execution.run(code + "else: assert False", SECONDS).passed


def test_a_program_has_no_network_where_that_is_permitted():
    code = (
        "import socket\nserver = socket.create_server(('127.0.0.1', 0))\nsocket.create_connection(server.getsockname())"
    )
    outcome = code_execution.run(code, SECONDS)
    assert outcome.passed == outcome.isolation["network"], outcome.reason


def test_a_program_is_not_root_and_cannot_write_elsewhere(tmp_path):
    target = tmp_path / "file"
    target.write_text("x")
    target.chmod(0o600)
    outcome = code_execution.run(f"import os\nassert os.geteuid() != 0\nopen({str(target)!r}, 'w')", SECONDS)
    if os.geteuid() == 0:
        assert outcome.isolation["root"] is False
        assert outcome.reason.startswith("PermissionError"), outcome.reason
        assert target.read_text() == "x"


def test_the_directory_is_removed_and_descriptors_are_closed(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(code_execution.tempfile, "tempdir", None)
    before = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0
    assert code_execution.run("import os\nos.makedirs('a/b')\nopen('a/b/c', 'w').close()", SECONDS).passed
    assert list(tmp_path.iterdir()) == []
    if before:
        assert len(os.listdir("/proc/self/fd")) == before


def test_hashes_are_the_same_in_every_run():
    reasons = {code_execution.run("raise ValueError(hash('a'))", SECONDS).reason for _ in range(2)}
    assert len(reasons) == 1 and reasons.pop().startswith("ValueError: ")


def test_a_program_does_not_import_what_lies_beside_the_sandbox_or_in_its_directory():
    code = "try: import sandbox\nexcept ImportError: pass\nelse: assert False\nopen('own.py', 'w').close()\nimport own"
    assert code_execution.run(code, SECONDS).reason.startswith("ModuleNotFoundError: No module named 'own'")


def test_without_a_proc_of_its_own_a_program_is_not_called_isolated_and_times_out(tmp_path, monkeypatch):
    source = code_execution._SCRIPT.read_text()
    for old, new in (('b"/proc"', 'b"/nowhere"'), ("int(file.read().split()[1]) * 1e-9", "1e9")):
        assert source.count(old) == 1
        source = source.replace(old, new)
    (tmp_path / "sandbox.py").write_text(source)
    is_isolated = not code_execution.run("", SECONDS).isolation["processes"]
    monkeypatch.setattr(code_execution, "_SCRIPT", tmp_path / "sandbox.py")
    monkeypatch.setattr(code_execution, "_START_SECONDS", 10.0)
    if is_isolated:
        outcome = code_execution.run("import time\ntime.sleep(1000)", 0.1)
        assert outcome.isolation["processes"] and outcome.reason == "timed out"


def test_isolation_is_complete_where_the_system_permits_it():
    command = ["unshare", "--user", "--pid", "--fork", "--mount", "--net", "true"]
    if shutil.which("unshare") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs a system that permits namespaces")
    isolation = code_execution.run("", SECONDS).isolation
    assert isolation == {"network": False, "processes": False, "files": False, "root": False}


def test_a_python_that_does_not_start_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(code_execution, "_SCRIPT", tmp_path / "nothing.py")
    with pytest.raises(RuntimeError, match="did not start a program"):
        code_execution.run("assert True", SECONDS)
