"""The Slurm launcher: exact commands; with stubs of Slurm's programs, its batch script runs on this machine."""

import getpass
import json
import os
import shlex
import signal
import subprocess
import sys

import launchers
import pytest
from launchers import AWKWARD, REPOSITORY, TRAIN

NAME = "--name=msn"
SUBMIT = ("--action=submit", NAME, "--time=1:00:00")
JOB = str(os.getpid())  # the port of the coordinator of `jax.distributed` follows from it
# Runs two tasks in one process group, the step. Like Slurm's, it kills them when it receives SIGTERM.
SRUN = f"""#!{sys.executable}
import itertools, os, pathlib, signal, subprocess, sys
command = list(itertools.dropwhile(lambda word: word.startswith("--"), sys.argv[1:]))
slurm = dict(SLURM_JOB_ID="{JOB}", SLURM_STEP_NODELIST="localhost", SLURM_NTASKS="2")
tasks = []
for task in ("0", "1"):
    env = os.environ | slurm | dict(SLURM_PROCID=task, SLURM_LOCALID=task)
    tasks.append(subprocess.Popen(command, env=env, process_group=tasks[0].pid if tasks else 0))
    (pathlib.Path(__file__).parents[1] / "step").write_text(str(tasks[0].pid))
signal.signal(signal.SIGTERM, lambda *_: os.killpg(tasks[0].pid, signal.SIGKILL))
codes = [task.wait() for task in tasks]
sys.exit(max(128 - code if code < 0 else code for code in codes))
"""
STUBS = {
    "sbatch": 'cat >"$TMP/script"; echo Submitted batch job',
    "scancel": 'kill -s TERM -- "-$(cat "$TMP/step")"',  # fails while there is no step
    "squeue": 'cat "$TMP/state"',
    "scontrol": "",
    "sleep": "exec /bin/sleep 0.05",
}
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
    for name, script in STUBS.items():
        launchers.write_stub(tmp_path / "bin", name, script)
    (tmp_path / "bin/srun").write_text(SRUN)
    (tmp_path / "bin/srun").chmod(0o755)
    (tmp_path / "venv/bin").mkdir(parents=True)
    (tmp_path / "venv/bin/activate").write_text("export IN_VENV=yes\n")
    (tmp_path / "state").write_text("RUNNING\n")
    (tmp_path / "train.py").write_text(TRAIN)
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


class Job:
    """The job that the launcher submits with the given flags, run on this machine."""

    def __init__(self, folder, *arguments):
        result = slurm(*SUBMIT, f"--venv={folder}/venv", f"--logs_dir={folder}", *arguments)
        assert result.returncode == 0, result.stderr
        self.folder = folder
        with open(folder / "log", "w") as log:
            env = os.environ | {"SLURM_JOB_ID": JOB}
            self.process = subprocess.Popen(["bash", folder / "script"], env=env, stdout=log, stderr=log, cwd=folder)

    def log(self):
        return (self.folder / "log").read_text()

    def signal(self, number, when="started\nstarted\n"):
        launchers.wait_for(lambda: when in self.log())
        self.process.send_signal(number)

    def wait(self):
        """(exit code, what Slurm's programs were called with while the job ran)."""
        code = self.process.wait(timeout=30)
        return code, [call for call in launchers.calls(self.folder / "bin") if call[0] not in ("sbatch", "sleep")]

    def end(self):
        """Kills what a failed test leaves behind."""
        if self.process.poll() is None:
            self.process.kill()
            if (self.folder / "step").exists():
                os.killpg(int((self.folder / "step").read_text()), signal.SIGKILL)


@pytest.fixture
def submit(tmp_path):
    """Starts a job, given flags of the launcher."""
    jobs = []

    def start(*arguments):
        jobs.append(Job(tmp_path, *arguments))
        return jobs[-1]

    yield start
    for job in jobs:
        job.end()


def train(folder):
    return f"--command={sys.executable} {folder}/train.py"


STOP = ["scancel", "--signal=TERM", f"{JOB}.0"]
STATE = ["squeue", "--noheader", f"--jobs={JOB}", "--format=%T"]


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


# --- The batch script


def test_every_task_receives_the_original_arguments(submit):
    code = "import json, os, sys; print(json.dumps([sys.argv[1:], os.environ['IN_VENV'], os.environ['WHO']]))"
    command = shlex.join([sys.executable, "-c", code, *AWKWARD]) + ' "$SLURM_PROCID"'
    job = submit(f"--command={command}", '--env=WHO=it\'s  "$5"=x')
    assert job.wait() == (0, [])
    *lines, last = job.log().splitlines()
    assert sorted(map(json.loads, lines)) == [[[*AWKWARD, task], "yes", 'it\'s  "$5"=x'] for task in "01"]
    assert last == "exit code: 0"


def test_before_the_time_limit_the_run_saves_and_is_requeued(submit, tmp_path):
    job = submit(train(tmp_path), "--requeue")
    job.signal(signal.SIGTERM)
    assert job.wait() == (143, [STOP, STATE, ["scontrol", "requeue", JOB]])
    assert job.log() == "started\nstarted\nsaved\nsaved\nexit code: 143\n"


def test_without_requeue_the_job_ends(submit, tmp_path):
    job = submit(train(tmp_path))
    job.signal(signal.SIGTERM)
    assert job.wait() == (143, [STOP])
    assert job.log().endswith("saved\nsaved\nexit code: 143\n")


def test_a_cancelled_run_saves_and_is_not_requeued(submit, tmp_path):
    job = submit(train(tmp_path), "--requeue")
    job.signal(signal.SIGUSR1)
    assert job.wait() == (143, [STOP])
    assert job.log().endswith("saved\nsaved\nexit code: 143\n")


def test_a_job_that_slurm_is_ending_is_not_requeued(submit, tmp_path):
    """After a plain scancel, or at the end of a preemption, where Slurm itself requeues."""
    (tmp_path / "state").write_text("COMPLETING\n")
    job = submit(train(tmp_path), "--requeue")
    job.signal(signal.SIGTERM)
    assert job.wait() == (143, [STOP, STATE])


def test_a_failed_run_is_not_requeued(submit):
    job = submit("--command=echo working; exit $((SLURM_PROCID * 3))", "--requeue")
    assert job.wait() == (3, [])
    assert job.log() == "working\nworking\nexit code: 3\n"


def test_a_signal_waits_for_a_step_that_is_starting(submit, tmp_path):
    slow = f"import pathlib, time; pathlib.Path('{tmp_path}/starting').touch(); time.sleep(0.5)"
    (tmp_path / "bin/srun").write_text(SRUN.replace("\n", f"\n{slow}\n", 1))
    job = submit(train(tmp_path))
    launchers.wait_for((tmp_path / "starting").exists)
    job.signal(signal.SIGTERM, when="")
    code, calls = job.wait()
    assert code == 143 and len(calls) > 1 and set(map(tuple, calls)) == {tuple(STOP)}


def test_a_second_signal_changes_nothing(submit, tmp_path):
    job = submit(train(tmp_path), "--requeue")
    job.signal(signal.SIGTERM)
    launchers.wait_for(lambda: STOP in launchers.calls(tmp_path / "bin"))
    job.signal(signal.SIGTERM)
    code, calls = job.wait()
    assert code == 143 and calls[-2:] == [STATE, ["scontrol", "requeue", JOB]]
    assert job.log().count("saved") == 2


def test_a_missing_environment_ends_the_job(submit, tmp_path):
    (tmp_path / "venv/bin/activate").write_text("false\n")
    job = submit("--command=echo started", "--requeue")
    assert job.wait() == (1, [])
    assert job.log() == "exit code: 1\n"


# What the train program does on several hosts, without training.
DISTRIBUTED = """
import sys, time
import jax
from jax.experimental import multihost_utils
jax.distributed.initialize()
print(jax.process_index(), jax.process_count(), jax.config.read("jax_cuda_visible_devices"), flush=True)
for step in range(600):
    if multihost_utils.reached_preemption_sync_point(step):
        sys.exit(143)
    time.sleep(0.05)
"""


def test_jax_finds_the_tasks_and_the_signal(submit, tmp_path):
    (tmp_path / "distributed.py").write_text(DISTRIBUTED)
    job = submit(f"--command={sys.executable} {tmp_path}/distributed.py", "--env=JAX_PLATFORMS=cpu")
    launchers.wait_for(lambda: {"0 2 0", "1 2 1"} <= set(job.log().splitlines()), seconds=60)
    job.signal(signal.SIGTERM, when="")
    assert job.wait() == (143, [STOP])


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


def test_the_launcher_does_not_import_jax():
    assert not launchers.imports_jax("slurm")
