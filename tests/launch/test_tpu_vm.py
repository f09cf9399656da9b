"""The launcher in subprocesses: exact commands, quoting through both shells, exit codes. Never uses the network."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import launchers
import pytest
from launchers import AWKWARD, REPOSITORY

LOCATION = ("--name=msn", "--zone=us-central2-b")


@pytest.fixture(autouse=True)
def gcloud_calls(tmp_path, monkeypatch):
    """Puts a fake gcloud first on the PATH, which records its arguments and exits with $GCLOUD_EXIT.

    No test can call the real one, even if the launcher is broken. Returns a function that reads the recorded calls.
    """
    script, record = tmp_path / "bin/gcloud", tmp_path / "record"
    script.parent.mkdir()
    script.write_text('#!/bin/sh\nprintf \'%s\\0\' gcloud "$@" >>"$RECORD"\necho >>"$RECORD"\nexit $GCLOUD_EXIT\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("RECORD", str(record))
    monkeypatch.setenv("GCLOUD_EXIT", "0")
    record.touch()
    return lambda: [line.split("\0")[:-1] for line in record.read_text().splitlines()]


def launch(*arguments, root=REPOSITORY, **env):
    argv = [sys.executable, str(root / "launch/tpu_vm.py"), *arguments]
    return subprocess.run(argv, capture_output=True, text=True, env=os.environ | env, timeout=30)


def dry_run(*arguments, root=REPOSITORY):
    """The printed commands, each line split as a shell would."""
    result = launch(*LOCATION, "--dry_run", *arguments, root=root)
    assert result.returncode == 0, result.stderr
    assert not Path(os.environ["RECORD"]).read_text(), "a dry run called gcloud"
    return [shlex.split(line) for line in result.stdout.splitlines()]


def tpus(line):
    return ["gcloud", "compute", "tpus", *line.split()]


def remote_line(*arguments):
    """The line that the workers' login shell receives: gcloud splits --command at spaces, and ssh joins the parts."""
    (argv,) = dry_run("--action=run", *arguments)
    (command,) = [argument for argument in argv if argument.startswith("--command=")]
    return command.removeprefix("--command=")


@pytest.fixture
def home(tmp_path):
    return launchers.make_home(tmp_path / "home")


def on_worker(home, line):
    env = os.environ | {"HOME": str(home)}
    return subprocess.run(["bash", "-c", line], cwd=home, env=env, capture_output=True, text=True, timeout=5)


def wait_for_log(home, text):
    log = home / "msn_jax/runs/tpu_vm/run.log"
    for _ in range(100):
        if log.exists() and text in log.read_text():
            return log.read_text()
        time.sleep(0.05)
    raise AssertionError(f"no {text!r} in the log: {log.read_text() if log.exists() else 'no log'}")


@pytest.fixture
def checkout(tmp_path):
    """A small copy of the repository, including files that the archive must not contain."""
    root = tmp_path / "checkout"
    for name in ("launch", "msn_jax"):
        shutil.copytree(REPOSITORY / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (".git/config", ".venv/bin/python", "runs/demo/report.json", "msn_jax/__pycache__/x.pyc"):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
    return root


def test_create():
    flags = ("--action=create", "--type=v5litepod-8", "--version=v2-alpha-tpuv5-lite")
    node = "--accelerator-type=v5litepod-8 --version=v2-alpha-tpuv5-lite"
    assert dry_run(*flags) == [tpus(f"tpu-vm create msn {node} --zone=us-central2-b")]
    assert dry_run(*flags, "--spot", "--project=p") == [
        tpus(f"tpu-vm create msn {node} --spot --zone=us-central2-b --project=p")
    ]


def test_create_queued():
    node = "--node-id=msn --accelerator-type=v4-32 --runtime-version=tpu-ubuntu2204-base --spot"
    assert dry_run("--action=create", "--queued", "--spot", "--type=v4-32", "--version=tpu-ubuntu2204-base") == [
        tpus(f"queued-resources create msn {node} --zone=us-central2-b")
    ]


def test_delete():
    assert dry_run("--action=delete") == [tpus("tpu-vm delete msn --quiet --zone=us-central2-b")]
    assert dry_run("--action=delete", "--queued") == [
        tpus("queued-resources delete msn --force --quiet --zone=us-central2-b")
    ]


def test_setup():
    mkdir, tar, scp, ssh = dry_run("--action=setup")
    archive = f"{REPOSITORY}/runs/tpu_vm/msn.tar.gz"
    assert mkdir == ["mkdir", "-p", f"{REPOSITORY}/runs/tpu_vm"]
    assert tar[:3] == ["tar", "-czf", archive] and tar[-3:] == ["-C", str(REPOSITORY), "."]
    assert scp == tpus(f"tpu-vm scp {archive} msn:msn_jax.tar.gz --worker=all --zone=us-central2-b")
    has_new_python = 'python3 -c "import ensurepip, sys; sys.exit(sys.version_info < (3, 11))"'
    uv = "curl -LsSf https://astral.sh/uv/install.sh | sh && ~/.local/bin/uv venv --seed --python=3.12 .venv"
    assert ssh == [
        *tpus("tpu-vm ssh msn --worker=all"),
        "--command=mkdir -p msn_jax && tar -xzf msn_jax.tar.gz -C msn_jax && cd msn_jax && { test -x .venv/bin/python"
        f" || if {has_new_python}; then python3 -m venv .venv; else {uv}; fi; }}"
        " && .venv/bin/python -m pip install -e '.[tpu]'",
        "--zone=us-central2-b",
    ]


def test_logs():
    tail = 'set -o pipefail; tail -n 50 msn_jax/runs/tpu_vm/run.log | sed "s/^/$(hostname): /"'
    assert dry_run("--action=logs") == [
        [*tpus("tpu-vm ssh msn --worker=all"), f"--command={tail}", "--zone=us-central2-b"]
    ]


@pytest.mark.parametrize(
    ("accelerator_type", "workers"),
    [("v3-32", 4), ("v4-8", 1), ("v4-32", 4), ("v5p-16", 2), ("v5litepod-8", 1), ("v5litepod-16", 4), ("v6e-256", 64)],
)
def test_logs_are_copied_from_every_worker(accelerator_type, workers):
    mkdir, *copies = dry_run("--action=logs", "--logs_dir=/tmp/my logs", f"--type={accelerator_type}")
    assert mkdir == ["mkdir", "-p", "/tmp/my logs"]
    assert copies == [
        [
            *tpus("tpu-vm scp msn:msn_jax/runs/tpu_vm/run.log"),
            f"/tmp/my logs/worker-{worker}.log",
            f"--worker={worker}",
            "--zone=us-central2-b",
        ]
        for worker in range(workers)
    ]


def test_run():
    (argv,) = dry_run("--action=run", "--command=python -m msn_jax.train")
    assert argv[:-2] == tpus("tpu-vm ssh msn --worker=all") and argv[-1] == "--zone=us-central2-b"
    assert argv[-2] == (
        "--command=cd msn_jax && mkdir -p runs/tpu_vm"
        ' && { ! kill -0 "$(cat runs/tpu_vm/run.pid 2>/dev/null)" 2>/dev/null'
        ' || { echo "$(hostname): a run is active, see msn_jax/runs/tpu_vm/run.pid" >&2; exit 1; }; }'
        " && . .venv/bin/activate && export PYTHONUNBUFFERED=1"
        " && { setsid bash -c 'trap : TERM; trap \"echo exit code: \\$?\" EXIT; python -m msn_jax.train'"
        " >>runs/tpu_vm/run.log 2>&1 </dev/null & echo $! >runs/tpu_vm/run.pid; }"
    )


def test_a_worker_receives_the_original_arguments(home):
    code = "import json, os, sys; print(json.dumps([sys.argv[1:], os.environ['IN_VENV'], os.environ['WHO']]))"
    command = shlex.join([sys.executable, "-c", code, *AWKWARD])
    line = remote_line(f"--command={command}", '--env=WHO=it\'s  "$5"=x', "--env=OTHER=")
    assert on_worker(home, line).returncode == 0
    log = wait_for_log(home, "exit code: 0\n")
    assert json.loads(log.splitlines()[0]) == [AWKWARD, "yes", 'it\'s  "$5"=x']


def test_the_command_is_interpreted_by_a_shell_of_the_worker(home):
    assert on_worker(home, remote_line("--command=cd && pwd && (exit 7)")).returncode == 0
    assert wait_for_log(home, "exit code: 7\n").splitlines()[0] == str(home)


def test_a_run_survives_a_lost_connection_and_a_second_is_refused(home):
    line = remote_line("--command=echo started; sleep 60")
    assert on_worker(home, line).returncode == 0
    wait_for_log(home, "started")
    pid = int((home / "msn_jax/runs/tpu_vm/run.pid").read_text())
    try:
        assert os.getsid(pid) == pid
        second = on_worker(home, line)
        assert second.returncode == 1 and "a run is active" in second.stderr
    finally:
        on_worker(home, "kill -- -$(cat msn_jax/runs/tpu_vm/run.pid)")  # the command from the module's docstring
    assert wait_for_log(home, "exit code: 143\n").count("started") == 1


def test_the_log_ends_with_the_exit_code(home):
    assert on_worker(home, remote_line("--command=exit 3")).returncode == 0
    wait_for_log(home, "exit code: 3\n")
    (tail,) = dry_run("--action=logs")
    shown = on_worker(home, tail[-2].removeprefix("--command="))
    assert shown.returncode == 0 and shown.stdout.endswith(": exit code: 3\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ("--action=create", "--type=v4-8", "--version=tpu-ubuntu2204-base"),
        ("--action=setup",),
        ("--action=run", f"--command={shlex.join(['python', *AWKWARD])}", "--env=A=b c"),
        ("--action=logs",),
        ("--action=delete", "--queued", "--project=p"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_runs_the_commands_that_a_dry_run_prints(arguments, checkout, gcloud_calls):
    planned = [argv for argv in dry_run(*arguments, root=checkout) if argv[0] == "gcloud"]
    assert not (checkout / "runs/tpu_vm").exists()
    result = launch(*LOCATION, *arguments, root=checkout)
    assert result.returncode == 0, result.stderr
    assert gcloud_calls() == planned


def test_the_archive_contains_only_the_working_tree(checkout):
    (checkout / "msn_jax/runs").mkdir()
    (checkout / "msn_jax/runs/kept.py").touch()
    assert launch(*LOCATION, "--action=setup", root=checkout).returncode == 0
    listing = subprocess.run(
        ["tar", "-tzf", checkout / "runs/tpu_vm/msn.tar.gz"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert {"./launch/tpu_vm.py", "./msn_jax/cli.py", "./msn_jax/runs/kept.py"} <= set(listing)
    assert not [name for name in listing if name.startswith(("./.git", "./.venv", "./runs")) or "__pycache__" in name]


def test_stops_at_the_first_failing_command_and_names_it(checkout, gcloud_calls):
    result = launch(*LOCATION, "--action=setup", root=checkout, GCLOUD_EXIT="3")
    assert result.returncode == 1
    (call,) = gcloud_calls()
    assert result.stderr.splitlines()[-1] == f"error: exit code 3 from: {shlex.join(call)}"


def test_a_missing_gcloud_is_named(tmp_path):
    result = launch(*LOCATION, "--action=delete", PATH=str(tmp_path))
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: gcloud is not on the PATH, cannot run: gcloud compute")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (LOCATION, "action"),
        ((*LOCATION, "--action=reboot"), "create|setup|run|logs|delete"),
        (("--action=delete", "--zone=z"), "--name"),
        (("--action=delete", "--name=msn"), "--zone"),
        (("--action=delete", "--zone=z", "--name=-force"), "--name=-force"),
        ((*LOCATION, "--action=create", "--type=v4-8"), "--version"),
        ((*LOCATION, "--action=create", "--version=v"), "--type"),
        ((*LOCATION, "--action=run"), "--command"),
        ((*LOCATION, "--action=run", "--command=ls", "--env=1A=b"), "NAME=VALUE"),
        ((*LOCATION, "--action=setup", "--command=ls"), "--command is not used by --action=setup"),
        ((*LOCATION, "--action=logs", "--logs_dir=d"), "--type"),
        ((*LOCATION, "--action=logs", f"--logs_dir={__file__}/sub", "--type=v4-8"), "is a file, not a directory"),
        ((*LOCATION, "--action=logs", "--logs_dir=d", "--type=h100-8"), "--type=h100-8"),
        ((*LOCATION, "--action=delete", "now"), "'now'"),
    ],
)
def test_invalid_flags_are_refused(arguments, named, tmp_path):
    result = launch(*arguments, PATH=str(tmp_path))
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and named in line


def test_the_launcher_does_not_import_jax():
    assert not launchers.imports_jax("tpu_vm")
