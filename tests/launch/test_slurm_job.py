"""The batch script that the Slurm launcher submits, run on this machine, with stubs of Slurm's programs."""

import json
import os
import shlex
import signal
import subprocess
import sys

import launchers
import pytest
from launchers import AWKWARD, TRAIN

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
STOP = ["scancel", "--signal=TERM", f"{JOB}.0"]
STATE = ["squeue", "--noheader", f"--jobs={JOB}", "--format=%T"]


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


class Job:
    """The job that the launcher submits with the given flags, run on this machine."""

    def __init__(self, folder, *arguments):
        flags = ("--action=submit", "--name=msn", "--time=60", f"--venv={folder}/venv", f"--logs_dir={folder}")
        result = launchers.launch("slurm.py", *flags, *arguments)
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


def test_every_task_receives_the_original_arguments(submit):
    code = (
        "import json, os, sys; values = [sys.argv[1:], os.environ['IN_VENV'], os.environ['WHO']]; "
        "os.write(1, json.dumps(values).encode() + bytes([10]))"  # a line at a time: two tasks share the log
    )
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
devices = jax.config.read("jax_cuda_visible_devices")
sys.stdout.write(f"{jax.process_index()} {jax.process_count()} {devices}\\n")
sys.stdout.flush()
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
