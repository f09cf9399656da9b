"""The launcher for one GPU host: exact commands; with stubs of ssh and scp, its shell lines run on this machine."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import launchers
import pytest
from launchers import AWKWARD, REPOSITORY, TRAIN

HOST = "--host=me@gpu1"
# The login shell of the host is /bin/sh, in the home directory $REMOTE_HOME.
SSH = 'cd "$REMOTE_HOME" && shift && HOME="$REMOTE_HOME" PATH="$REMOTE_PATH" exec /bin/sh -c "$*"'
SCP = 'cp "$1" "$REMOTE_HOME/${2#*:}"'
# On the host. Its virtual environments have a python that does nothing.
PYTHON3 = """\
[ "$1 $2" = "-m venv" ] || exit 0
mkdir -p "$3/bin"
echo "export IN_VENV=yes" >"$3/bin/activate"
ln -s /bin/true "$3/bin/python"
"""


@pytest.fixture(autouse=True)
def stubs(tmp_path, monkeypatch):
    """The folder of the stubs, first on the PATH: no test calls the real ssh, even if the launcher is broken."""
    for name, script in (("ssh", SSH), ("scp", SCP)):
        launchers.write_stub(tmp_path / "bin", name, script)
    (tmp_path / "home").mkdir()
    (tmp_path / "remote").mkdir()
    launchers.write_stub(tmp_path / "remote/bin", "python3", PYTHON3)
    monkeypatch.setenv("REMOTE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("REMOTE_PATH", f"{tmp_path}/remote/bin:{os.environ['PATH']}")
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    return tmp_path / "bin"


@pytest.fixture
def checkout(tmp_path):
    """A small copy of the repository, under git, with files that git ignores."""
    root = tmp_path / "checkout"
    for name in ("launch", "msn_jax"):
        shutil.copytree(REPOSITORY / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / ".gitignore", root)
    subprocess.run(["git", "init", "--quiet", root], check=True)
    paths = ".venv/bin/python runs/x/log models/x/config.json build/lib/x.py x.egg-info/PKG-INFO .ruff_cache/x"
    paths += " .pytest_cache/x .hypothesis/x notebooks/.ipynb_checkpoints/x.ipynb msn_jax/__pycache__/x.pyc"
    for path in [*paths.split(), "msn_jax/runs_of_x.py", "notes.txt"]:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
    return root


@pytest.fixture
def home(tmp_path):
    return launchers.make_home(tmp_path / "home")


def gpu_host(*arguments, root=REPOSITORY):
    return launchers.launch("gpu_host.py", HOST, *arguments, root=root)


def dry_run(*arguments):
    """The printed commands, each line split as a shell would."""
    return [shlex.split(line) for line in launchers.dry_run("gpu_host.py", HOST, *arguments).splitlines()]


def log(home):
    path = home / "msn_jax/runs/gpu_host/run.log"
    return path.read_text() if path.exists() else ""


def has_ended(home):
    """Whether the shell of the run has ended; it writes the exit code just before. A zombie has no command line."""
    cmdline = Path("/proc", (home / "msn_jax/runs/gpu_host/run.pid").read_text().strip(), "cmdline")
    try:
        return not cmdline.read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_setup(stubs):
    mkdir, tar, remote_mkdir, scp, ssh = dry_run("--action=setup")
    archive = f"{REPOSITORY}/runs/gpu_host/me@gpu1.tar.gz"
    excluded = "./.git ./.venv ./runs ./build __pycache__ *.egg-info .*_cache .hypothesis ./models .ipynb_checkpoints"
    assert mkdir == ["mkdir", "-p", f"{REPOSITORY}/runs/gpu_host"]
    assert tar == [
        *["tar", "-czf", archive, *(f"--exclude={pattern}" for pattern in excluded.split())],
        *["-C", str(REPOSITORY), "."],
    ]
    assert remote_mkdir == ["ssh", "me@gpu1", "mkdir -p msn_jax"]
    assert scp == ["scp", archive, "me@gpu1:msn_jax.tar.gz"]
    has_new_python = 'python3 -c "import ensurepip, sys; sys.exit(sys.version_info < (3, 11))"'
    uv = "curl -LsSf https://astral.sh/uv/install.sh | sh && ~/.local/bin/uv venv --seed --python=3.12 .venv"
    assert ssh == [
        *["ssh", "me@gpu1"],
        "mkdir -p msn_jax && tar -xzf msn_jax.tar.gz -C msn_jax && cd msn_jax && { test -x .venv/bin/python"
        f" || if {has_new_python}; then python3 -m venv .venv; else {uv}; fi; }}"
        " && .venv/bin/python -m pip install -e '.[cuda]'",
    ]
    assert launchers.calls(stubs) == []


def test_run():
    assert dry_run("--action=run", "--command=python -m msn_jax.train", "--env=A=b c", "--directory=/data/msn") == [
        [
            *["ssh", "me@gpu1"],
            "cd /data/msn && mkdir -p runs/gpu_host"
            ' && { ! grep -qs "echo exit code" "/proc/$(cat runs/gpu_host/run.pid 2>/dev/null)/cmdline"'
            ' || { echo "$(hostname): a run is active, see /data/msn/runs/gpu_host/run.pid" >&2; exit 1; }; }'
            " && . .venv/bin/activate && export PYTHONUNBUFFERED=1 && export A='b c'"
            " && { setsid bash -c 'trap : TERM; trap \"echo exit code: \\$?\" EXIT; python -m msn_jax.train'"
            " >>runs/gpu_host/run.log 2>&1 </dev/null & echo $! >runs/gpu_host/run.pid; }",
        ]
    ]


def test_logs_and_stop():
    assert dry_run("--action=logs") == [["ssh", "me@gpu1", "tail -n 50 msn_jax/runs/gpu_host/run.log"]]
    assert dry_run("--action=stop") == [
        [
            *["ssh", "me@gpu1"],
            'cd msn_jax && { grep -qs "echo exit code" "/proc/$(cat runs/gpu_host/run.pid 2>/dev/null)/cmdline"'
            ' || { echo "$(hostname): no run is active" >&2; exit 1; }; }'
            ' && kill -- "-$(cat runs/gpu_host/run.pid)"',
        ]
    ]


def test_setup_copies_what_git_does_not_ignore_and_makes_an_environment(checkout, tmp_path, stubs):
    result = gpu_host("--action=setup", "--directory=work/msn", root=checkout)
    assert result.returncode == 0, result.stderr
    tree = tmp_path / "home/work/msn"
    files = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(files, cwd=checkout, capture_output=True, text=True, check=True).stdout.splitlines()
    copied = {str(path.relative_to(tree)) for path in tree.rglob("*") if path.is_file()}
    assert {"msn_jax/runs_of_x.py", "notes.txt", "launch/gpu_host.py"} <= copied
    assert {path for path in copied if not path.startswith(".venv")} == set(listed)
    assert (tree / ".venv/bin/activate").exists()
    assert [call[0] for call in launchers.calls(stubs)] == ["ssh", "scp", "ssh"]


def test_the_host_receives_the_original_arguments(home):
    code = "import json, os, sys; print(json.dumps([sys.argv[1:], os.environ['IN_VENV'], os.environ['WHO']]))"
    command = shlex.join([sys.executable, "-c", code, *AWKWARD])
    result = gpu_host("--action=run", f"--command={command}", '--env=WHO=it\'s  "$5"=x')
    assert result.returncode == 0, result.stderr
    launchers.wait_for(lambda: log(home).endswith("exit code: 0\n"))
    assert json.loads(log(home).splitlines()[0]) == [AWKWARD, "yes", 'it\'s  "$5"=x']


def test_the_log_ends_with_the_exit_code(home):
    assert gpu_host("--action=run", "--command=echo working; exit 3").returncode == 0
    launchers.wait_for(lambda: "exit code" in log(home))
    assert gpu_host("--action=logs").stdout == "working\nexit code: 3\n"


def test_a_run_is_active_until_it_is_stopped_and_saves(home, tmp_path):
    (tmp_path / "train.py").write_text(TRAIN)
    run = ("--action=run", f"--command={sys.executable} {tmp_path}/train.py")
    assert gpu_host(*run).returncode == 0
    launchers.wait_for(lambda: log(home) == "started\n")
    second = gpu_host(*run)
    assert second.returncode == 1
    assert "a run is active, see msn_jax/runs/gpu_host/run.pid" in second.stderr
    assert gpu_host("--action=stop").returncode == 0
    launchers.wait_for(lambda: log(home) == "started\nsaved\nexit code: 143\n" and has_ended(home))
    assert gpu_host("--action=run", "--command=echo resumed").returncode == 0
    launchers.wait_for(lambda: log(home).endswith("143\nresumed\nexit code: 0\n"))


def test_stop_without_a_run_is_an_error(home):
    for _ in range(2):  # before any run, and after one
        result = gpu_host("--action=stop")
        assert result.returncode == 1 and ": no run is active\n" in result.stderr
        assert gpu_host("--action=run", "--command=true").returncode == 0
        launchers.wait_for(lambda: log(home).endswith("exit code: 0\n") and has_ended(home))


@pytest.mark.parametrize("code", ["import time; time.sleep(30)", ""], ids=["other program", "zombie"])
def test_the_number_of_another_process_is_not_an_active_run(code, home):
    with subprocess.Popen([sys.executable, "-c", code]) as other:
        try:
            if not code:
                launchers.wait_for(lambda: "State:\tZ" in Path(f"/proc/{other.pid}/status").read_text())
            (home / "msn_jax/runs/gpu_host").mkdir(parents=True)
            (home / "msn_jax/runs/gpu_host/run.pid").write_text(f"{other.pid}\n")
            assert ": no run is active\n" in gpu_host("--action=stop").stderr
            assert gpu_host("--action=run", "--command=true").returncode == 0
            launchers.wait_for(lambda: log(home) == "exit code: 0\n")
        finally:
            other.kill()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((HOST,), "action"),
        ((HOST, "--action=delete"), "setup|run|logs|stop"),
        (("--action=setup",), "--action=setup needs --host"),
        (("--action=setup", "--host=-oProxyCommand=x"), "--host=-oProxyCommand=x: use a host of ~/.ssh/config"),
        (("--action=setup", "--host=gpu1;ls"), "--host=gpu1;ls: use"),
        ((HOST, "--action=setup", "--directory=~/msn"), "--directory=~/msn: use a path"),
        ((HOST, "--action=setup", "--directory=../msn"), "--directory=../msn: use a path"),
        ((HOST, "--action=setup", "--directory=a b"), "--directory=a b: use a path"),
        ((HOST, "--action=run"), "--action=run needs --command"),
        ((HOST, "--action=run", "--command=ls", "--env=1A=b"), "--env=1A=b: use NAME=VALUE"),
        ((HOST, "--action=stop", "--command=ls"), "--command is not used by --action=stop"),
        ((HOST, "--action=logs", "--env=A=b"), "--env is not used by --action=logs"),
        ((HOST, "--action=stop", "now"), "'now'"),
    ],
)
def test_invalid_flags_are_refused(arguments, named, stubs):
    result = launchers.launch("gpu_host.py", *arguments)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and named in line
    assert launchers.calls(stubs) == []


def test_the_launcher_does_not_import_jax():
    assert not launchers.imports_jax("gpu_host")
