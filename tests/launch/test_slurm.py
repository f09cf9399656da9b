"""The Slurm launcher: exact commands, and what it refuses."""

import getpass
import os
import shlex
import subprocess
import sys

import launchers
import pytest
from launchers import AWKWARD, REPOSITORY

NAME = "--name=msn"
SUBMIT = ("--action=submit", NAME, "--time=1:00:00")
BATCH_SCRIPT = """\
#!/bin/bash
finish() {
    code=$?
    echo "exit code: $code"
}
trap finish EXIT
. /envs/msn/bin/activate || exit
export PYTHONUNBUFFERED=1
export A='b c'

srun --export=ALL --label --kill-on-bad-exit=0 --cpus-per-task=12 --gpu-bind=none bash -c 'trap : TERM; hostname' &
step=$!

# srun would kill its tasks on SIGTERM. The first attempts fail if the step is only starting.
stop() {
    signalled=1
    until scancel --signal=TERM "$SLURM_JOB_ID.0" || ! kill -0 "$step" 2>/dev/null; do sleep 5; done
}
trap stop TERM USR1

signalled=1
while [ -n "$signalled" ]; do # a signal ends wait
    signalled=
    wait "$step"
    code=$?
done
exit "$code"
"""
CODE = """
    echo "exit code: $code"
"""
REQUEUE = """
    echo "exit code: $code"
    if [ "$code" = 143 ] && [ -z "$cancelled" ] &&
        [ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" = RUNNING ]; then
        scontrol requeue "$SLURM_JOB_ID"
    fi
"""


@pytest.fixture(autouse=True)
def stubs(tmp_path, monkeypatch):
    """The folder of the stubs, first on the PATH, with a virtual environment beside it."""
    for name in ("sbatch", "scancel", "squeue"):
        launchers.write_stub(tmp_path / "bin", name, 'cat >"$TMP/script"')
    (tmp_path / "venv/bin").mkdir(parents=True)
    (tmp_path / "venv/bin/activate").touch()
    monkeypatch.setenv("TMP", str(tmp_path))
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    return tmp_path / "bin"


def slurm(*arguments, **env):
    return launchers.launch("slurm.py", *arguments, **env)


def dry_run(*arguments):
    """The printed commands, each split as a shell would, and the batch script."""
    text, _, rest = launchers.dry_run("slurm.py", *arguments).partition(" <<'END'\n")
    script, end, after = rest.partition("END\n")
    assert bool(end) == ("--action=submit" in arguments) and not after
    return [shlex.split(line) for line in text.splitlines()], script


# --- Commands


def test_submit(stubs):
    flags = (
        "--nodes=2 --gpus_per_node=8 --cpus_per_task=12 --partition=p --account=a --venv=/envs/msn --logs_dir=/tmp/100%"
    )
    options = ("--signal_seconds=120", "--option=--mem=0", "--option=--constraint=h100&ib", "--env=A=b c")
    (mkdir, sbatch), script = dry_run(*SUBMIT, *flags.split(), *options, "--command=hostname")
    assert mkdir == ["mkdir", "-p", "/tmp/100%"]
    assert sbatch == [
        *"sbatch --job-name=msn --nodes=2 --ntasks-per-node=8 --cpus-per-task=12 --gpus-per-node=8".split(),
        *"--partition=p --account=a --time=1:00:00 --signal=B:TERM@120 --no-requeue --dependency=singleton".split(),
        *[f"--chdir={REPOSITORY}", "--output=/tmp/100%%/msn.log", "--open-mode=append"],
        *["--mem=0", "--constraint=h100&ib"],
    ]
    assert script == BATCH_SCRIPT
    assert launchers.calls(stubs) == []


def test_the_defaults_are_one_gpu_and_the_checkout():
    (mkdir, sbatch), script = dry_run(*SUBMIT, "--command=hostname")
    assert mkdir == ["mkdir", "-p", f"{REPOSITORY}/runs/slurm"]
    assert sbatch == [
        *"sbatch --job-name=msn --nodes=1 --ntasks-per-node=1 --gpus-per-node=1 --time=1:00:00".split(),
        *"--signal=B:TERM@300 --no-requeue --dependency=singleton".split(),
        *[f"--chdir={REPOSITORY}", f"--output={REPOSITORY}/runs/slurm/msn.log", "--open-mode=append"],
    ]
    start = script.index(". ")
    assert script[start:].startswith(
        f". {REPOSITORY}/.venv/bin/activate || exit\nexport PYTHONUNBUFFERED=1\n\n"
        "srun --export=ALL --label --kill-on-bad-exit=0 --gpu-bind=none bash -c 'trap : TERM; hostname' &\n"
    )


def test_requeue():
    flags = ("--env=A=b c", "--cpus_per_task=12", "--venv=/envs/msn", "--command=hostname")
    (_, sbatch), script = dry_run(*SUBMIT, "--requeue", *flags)
    assert "--requeue" in sbatch and "--no-requeue" not in sbatch
    traps = "\ncancelled=\ntrap stop TERM\ntrap 'cancelled=1; stop' USR1\n"
    assert script == BATCH_SCRIPT.replace(CODE, REQUEUE).replace("\ntrap stop TERM USR1\n", traps)


def test_one_process_can_use_all_gpus_of_its_node():
    (_, sbatch), script = dry_run(*SUBMIT, "--gpus_per_node=4", "--tasks_per_node=1", "--command=hostname")
    assert "--ntasks-per-node=1" in sbatch and "--gpus-per-node=4" in sbatch
    assert "\nexport JAX_LOCAL_DEVICE_IDS=0,1,2,3\n" in script


def test_a_job_without_gpus():
    (_, sbatch), script = dry_run(*SUBMIT, "--nodes=3", "--gpus_per_node=0", "--command=hostname")
    assert "--ntasks-per-node=1" in sbatch and "gpu" not in " ".join(sbatch)
    assert "\nsrun --export=ALL --label --kill-on-bad-exit=0 bash -c " in script


@pytest.mark.parametrize(
    ("image", "gpus", "words"),
    [
        ("docker://nvcr.io/nvidia/jax:26.01-py3", 1, ["--nv"]),
        ("/images/a b.sif", 1, ["--nv"]),
        ("/images/a b.sif", 0, []),
    ],
)
def test_a_job_in_a_container(image, gpus, words):
    _, script = dry_run(*SUBMIT, f"--gpus_per_node={gpus}", f"--container={image}", "--command=hostname")
    (line,) = [line for line in script.splitlines() if line.startswith("srun ")]
    argv = shlex.split(line.removesuffix(" &"))
    container = ["apptainer", "exec", *words, f"--bind={REPOSITORY}", f"--pwd={REPOSITORY}", image]
    assert argv[argv.index("apptainer") :] == [*container, "bash", "-c", "trap : TERM; hostname"]
    assert "activate" not in script


def test_relative_paths_are_those_of_the_shell(tmp_path):
    argv = [sys.executable, REPOSITORY / "launch/slurm.py", *SUBMIT, "--venv=venv", "--logs_dir=logs", "--command=true"]
    result = subprocess.run([*argv, "--dry_run"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert f"--output={tmp_path}/logs/msn.log" in result.stdout and f". {tmp_path}/venv/bin/activate" in result.stdout


def test_status_logs_and_cancel():
    jobs = [f"--user={getpass.getuser()}", "--name=msn"]
    assert dry_run("--action=status", NAME) == ([["squeue", *jobs]], "")
    assert dry_run("--action=logs", NAME)[0] == [["tail", "-n", "50", f"{REPOSITORY}/runs/slurm/msn.log"]]
    assert dry_run("--action=logs", NAME, "--logs_dir=/x")[0] == [["tail", "-n", "50", "/x/msn.log"]]
    assert dry_run("--action=cancel", NAME)[0] == [
        ["scancel", *jobs, "--state=PENDING"],
        ["scancel", *jobs, "--state=RUNNING", "--batch", "--signal=USR1"],
    ]


def test_a_dry_run_prints_what_a_shell_can_run(tmp_path, stubs):
    command = shlex.join([sys.executable, *AWKWARD]) + "\nEND\nEND_"
    arguments = (*SUBMIT, f"--venv={tmp_path}/venv", f"--logs_dir={tmp_path}/my logs", f"--command={command}")
    assert slurm(*arguments).returncode == 0
    script, (submitted,) = (tmp_path / "script").read_text(), launchers.calls(stubs)
    subprocess.run(["sh", "-c", launchers.dry_run("slurm.py", *arguments)], check=True)
    assert (tmp_path / "script").read_text() == script and "END__" not in script
    assert launchers.calls(stubs) == [submitted, submitted]


# --- Errors


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((NAME,), "action"),
        ((NAME, "--action=run"), "submit|status|logs|cancel"),
        (("--action=status",), "--action=status needs --name"),
        (("--action=cancel", "--name=a,b"), "--name=a,b: use up to 64 letters"),
        (("--action=submit", NAME, "--time=60"), "--action=submit needs --command"),
        (("--action=submit", NAME, "--command=ls"), "--action=submit needs --time"),
        ((*SUBMIT, "--command=ls", "--time=1h"), "--time=1h: use MINUTES, HOURS:MINUTES:SECONDS or DAYS-HOURS"),
        ((*SUBMIT, "--command=ls", "--time=6"), "--time=6: SIGTERM could come at the start"),
        ((*SUBMIT, "--command=ls", "--signal_seconds=3540"), "--time=1:00:00: SIGTERM could come at the start"),
        ((*SUBMIT, "--command=ls", "--signal_seconds=70000"), "--signal_seconds=70000: use at most 65535"),
        ((*SUBMIT, "--command=ls", "--nodes=0"), "--nodes=0"),
        (
            (*SUBMIT, "--command=ls", "--gpus_per_node=8", "--tasks_per_node=2"),
            "--tasks_per_node=2: use 1 or 8, one per",
        ),
        ((*SUBMIT, "--command=ls", "--gpus_per_node=0", "--tasks_per_node=2"), "--tasks_per_node=2: use 1"),
        ((*SUBMIT, "--nodes=2", "--command=python -m msn_jax.train"), "--command: its 2 tasks would train the same"),
        ((*SUBMIT, "--command=ls", "--option=-p"), "--option=-p: use a long option of sbatch"),
        ((*SUBMIT, "--command=ls", "--env=1A=b"), "--env=1A=b: use NAME=VALUE"),
        ((*SUBMIT, "--command=ls", "--venv=v", "--container=c"), "--container and --venv exclude each other"),
        ((*SUBMIT, "--command=ls", f"--logs_dir={__file__}"), "is a file, not a directory"),
        ((*SUBMIT, "--command=ls", "--venv=/no/venv"), "--venv=/no/venv: not a virtual environment; make it with"),
        ((*SUBMIT, "--command=ls", "--container=/no/x.sif"), "--container=/no/x.sif: no such image"),
        (("--action=status", NAME, "--nodes=2"), "--nodes is not used by --action=status"),
        (("--action=logs", NAME, "--requeue"), "--requeue is not used by --action=logs"),
        (("--action=cancel", NAME, "7"), "'7'"),
    ],
)
def test_invalid_flags_are_refused(arguments, named, stubs):
    result = slurm(*arguments)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and named in line
    assert launchers.calls(stubs) == []


@pytest.mark.parametrize("time", ["7", "6:01", "0:06:01", "0-1", "0-0:07", "0-0:06:01", "2-12"])
def test_time_limits_in_all_formats_of_slurm(time):
    (_, sbatch), _ = dry_run("--action=submit", NAME, f"--time={time}", "--command=ls")
    assert f"--time={time}" in sbatch


@pytest.mark.parametrize("time", ["6", "6:00", "0:06:00", "0-0", "0-0:06", "0-0:06:00", "1:2:3:4", "1-1:2:3:4", ""])
def test_time_limits_that_leave_no_time(time):
    assert slurm("--action=submit", NAME, f"--time={time}", "--command=ls", "--dry_run").returncode == 2


def test_a_limit_of_a_day_leaves_time_after_the_longest_signal():
    (_, sbatch), _ = dry_run("--action=submit", NAME, "--time=1-0", "--signal_seconds=65535", "--command=ls")
    assert "--signal=B:TERM@65535" in sbatch


def test_the_launcher_does_not_import_jax():
    assert not launchers.imports_jax("slurm")
