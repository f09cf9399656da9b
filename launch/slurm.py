r"""Submits a program of the project as a Slurm job. Runs on a login node, in a checkout that all nodes mount.

An example with two nodes of eight GPUs each:

    python launch/slurm.py --action=submit --name=msn --nodes=2 --gpus_per_node=8 --cpus_per_task=12 --time=12:00:00 \
        --requeue --command='python -m msn_jax.train --distributed --config=configs/X.py --workdir=runs/x'
    python launch/slurm.py --action=status --name=msn
    python launch/slurm.py --action=logs --name=msn
    python launch/slurm.py --action=cancel --name=msn

`--dry_run` prints the commands, with the batch script, for a shell, and runs nothing.

Tasks: one per GPU. `jax.distributed.initialize()` (`--distributed` of the train program) finds the coordinator and the
number of processes in Slurm's variables, and gives each process the GPU number SLURM_LOCALID of its node. Every task
must therefore see all GPUs of its node, and nothing may bind them to tasks. With `--tasks_per_node=1`, one process uses
all GPUs of its node: JAX_LOCAL_DEVICE_IDS has their numbers.

SIGTERM: `--signal_seconds` before the time limit, Slurm sends SIGTERM to the batch script, which forwards it to the
tasks with `scancel`: srun would kill its tasks if it received SIGTERM. The train program saves and exits with code 143.
With `--requeue`, the job then returns to the queue and resumes when it starts again. `cancel` sends SIGUSR1, which the
batch script forwards as SIGTERM, too, but without requeuing.

Notes:

  * `--command` is a shell line that every task interprets: in single quotes, `$SLURM_PROCID` is the task's number. It
    starts in the checkout, in the virtual environment `--venv`, or with Apptainer in the image `--container`, with the
    variables of `--env=NAME=VALUE`.
  * A job starts only when earlier jobs of the same name have ended, so that two never write to one workdir. They share
    the log LOGS_DIR/NAME.log. It has the task's number before each line, and `exit code: N` at the end of each job.
  * A job runs the sources as they are when it starts.
  * `--option` passes other options to sbatch: `--option=--constraint=h100 --option=--mem=0`.
  * The login node needs sbatch, squeue, scancel and absl-py, but not JAX.
"""

import dataclasses
import getpass
import re
import shlex
import sys
from pathlib import Path

from absl import flags

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout, without JAX installed

from launch import shell
from msn_jax.cli import InputError, check_directory, run

SUBMIT = "nodes gpus_per_node tasks_per_node cpus_per_task time partition account option signal_seconds requeue"
ACTIONS = {  # action -> its flags in addition to --name
    "submit": (*SUBMIT.split(), "venv", "container", "command", "env", "logs_dir"),
    "status": (),
    "logs": ("logs_dir",),
    "cancel": (),
}
REQUIRED = {"submit": ("command", "time")}
LOGS_DIR = "runs/slurm"  # in the checkout
MAX_SIGNAL_SECONDS = 65535  # a limit of sbatch
SIGNAL_RESOLUTION = 60  # Slurm may signal so many seconds early
# At the end of the batch script. A job that is not RUNNING has been cancelled with scancel, or is requeued by Slurm.
REQUEUE = """
    if [ "$code" = 143 ] && [ -z "$cancelled" ] &&
        [ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" = RUNNING ]; then
        scontrol requeue "$SLURM_JOB_ID"
    fi"""

flags.DEFINE_enum("action", None, list(ACTIONS), "What to do.", required=True)
flags.DEFINE_string("name", "", "Name of the job.")
flags.DEFINE_integer("nodes", 1, "submit: number of nodes.", lower_bound=1)
flags.DEFINE_integer("gpus_per_node", 1, "submit: GPUs on each node; 0: none.", lower_bound=0)
flags.DEFINE_integer("tasks_per_node", 0, "submit: 1, or one per GPU, the default.", lower_bound=0)
flags.DEFINE_integer("cpus_per_task", 0, "submit: CPU cores of each task; default: the cluster's.", lower_bound=0)
flags.DEFINE_string("time", "", "submit: time limit, in a format of Slurm: 90 (minutes), 12:00:00, 2-00 (days-hours).")
flags.DEFINE_string("partition", "", "submit: partition; default: the cluster's.")
flags.DEFINE_string("account", "", "submit: account to charge; default: the user's.")
flags.DEFINE_multi_string("option", [], "submit: another option of sbatch, such as --mem=0; may be repeated.")
flags.DEFINE_integer("signal_seconds", 300, "submit: seconds between SIGTERM and the time limit.", lower_bound=1)
flags.DEFINE_bool("requeue", False, "submit: put the job in the queue again after it saved on SIGTERM.")
flags.DEFINE_string("venv", "", "submit: virtual environment; default: .venv of the checkout.")
flags.DEFINE_string("container", "", "submit: Apptainer image to run in, instead of a virtual environment.")
flags.DEFINE_string("command", "", "submit: shell line for every task.")
flags.DEFINE_multi_string("env", [], "submit: NAME=VALUE for the command; may be repeated.")
flags.DEFINE_string("logs_dir", "", f"submit, logs: directory of NAME.log; default: {LOGS_DIR} of the checkout.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the commands, with the batch script, and run nothing.")


@dataclasses.dataclass(frozen=True)
class Options:
    """The values of all flags except `--dry_run`."""

    action: str
    name: str
    nodes: int = 1
    gpus_per_node: int = 1
    tasks_per_node: int = 0
    cpus_per_task: int = 0
    time: str = ""
    partition: str = ""
    account: str = ""
    option: tuple[str, ...] = ()
    signal_seconds: int = 300
    requeue: bool = False
    venv: str = ""
    container: str = ""
    command: str = ""
    env: tuple[str, ...] = ()
    logs_dir: str = ""

    @property
    def tasks(self) -> int:
        """Tasks per node."""
        return self.tasks_per_node or max(1, self.gpus_per_node)

    @property
    def environment(self) -> Path:
        """The virtual environment."""
        return Path(self.venv or shell.REPOSITORY / ".venv").absolute()

    @property
    def log(self) -> Path:
        """The log of all jobs of this name."""
        return Path(self.logs_dir or shell.REPOSITORY / LOGS_DIR).absolute() / f"{self.name}.log"


# --- Checks


def check(options: Options) -> None:
    """Raises InputError for a flag that is missing, malformed or unused by the action."""
    shell.check_required(options, ("name", *REQUIRED.get(options.action, ())))
    if not re.fullmatch(r"[a-zA-Z0-9][\w.-]{0,63}", options.name, re.ASCII):
        raise InputError(f"--name={options.name}: use up to 64 letters, digits and ._-, a letter or digit first")
    shell.check_unused(options, ACTIONS)
    shell.check_env(options.env)
    if options.action == "submit":
        check_tasks(options)
        check_time(options)
        for option in options.option:
            if not re.fullmatch(r"--[a-z]([a-z-]*[a-z])?(=.*)?", option):
                raise InputError(f"--option={option}: use a long option of sbatch, --option=--NAME=VALUE")
        if options.container and options.venv:
            raise InputError("--container and --venv exclude each other: remove one")
        check_directory(options.log.parent, f"--logs_dir={options.log.parent}")


def check_tasks(options: Options) -> None:
    """Raises InputError if the tasks do not fit the GPUs or the command."""
    if options.tasks not in (1, options.gpus_per_node):
        one_per_gpu = f" or {options.gpus_per_node}, one per GPU" if options.gpus_per_node > 1 else ""
        raise InputError(f"--tasks_per_node={options.tasks_per_node}: use 1{one_per_gpu}")
    tasks = options.nodes * options.tasks
    if tasks > 1 and "msn_jax.train" in options.command and "--distributed" not in options.command:
        raise InputError(f"--command: its {tasks} tasks would train the same run separately: add --distributed to it")


def check_time(options: Options) -> None:
    """Raises InputError if the time limit is malformed or leaves no time before SIGTERM."""
    if options.signal_seconds > MAX_SIGNAL_SECONDS:
        raise InputError(f"--signal_seconds={options.signal_seconds}: use at most {MAX_SIGNAL_SECONDS}, Slurm's limit")
    needed = options.signal_seconds + SIGNAL_RESOLUTION
    if time_limit(options.time) <= needed:
        raise InputError(
            f"--time={options.time}: SIGTERM could come at the start, as it comes up to {needed} s before the limit: "
            "raise --time or lower --signal_seconds"
        )


def time_limit(time: str) -> int:
    """Seconds of a time limit in one of Slurm's formats: m, m:s, h:m:s, d-h, d-h:m or d-h:m:s."""
    if not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", time, re.ASCII):
        raise InputError(f"--time={time}: use MINUTES, HOURS:MINUTES:SECONDS or DAYS-HOURS")
    days, _, clock = time.rpartition("-")
    values = [int(value) for value in clock.split(":")]
    units = (3600, 60, 1) if days or len(values) == 3 else (60, 1)
    return int(days or 0) * 86400 + sum(value * unit for value, unit in zip(values, units, strict=False))


def check_software(options: Options) -> None:
    """Raises InputError if the virtual environment or the image is not there."""
    if options.container:
        if "://" not in options.container and not Path(options.container).exists():
            raise InputError(f"--container={options.container}: no such image")
    elif not (options.environment / "bin/activate").exists():
        raise InputError(
            f"--venv={options.environment}: not a virtual environment; make it with python3 -m venv, and install "
            "the project in it with pip install -e '.[cuda]'"
        )


# --- Commands


def batch_script(options: Options) -> str:
    """The script that Slurm runs on the first node: it starts the tasks, forwards signals and requeues the job."""
    requeue, traps = "", "trap stop TERM USR1"
    if options.requeue:
        requeue, traps = REQUEUE, "cancelled=\ntrap stop TERM\ntrap 'cancelled=1; stop' USR1"
    return f"""\
#!/bin/bash
finish() {{
    code=$?
    echo "exit code: $code"{requeue}
}}
trap finish EXIT
{setup_lines(options)}

{shlex.join(task_command(options))} &
step=$!

# srun would kill its tasks on SIGTERM. The first attempts fail if the step is only starting.
stop() {{
    signalled=1
    until scancel --signal=TERM "$SLURM_JOB_ID.0" || ! kill -0 "$step" 2>/dev/null; do sleep 5; done
}}
{traps}

signalled=1
while [ -n "$signalled" ]; do # a signal ends wait
    signalled=
    wait "$step"
    code=$?
done
exit "$code"
"""


def setup_lines(options: Options) -> str:
    """The part of the batch script that prepares the environment of the tasks."""
    activate = [] if options.container else [f". {shlex.quote(str(options.environment / 'bin/activate'))} || exit"]
    one_process = options.tasks == 1 and options.gpus_per_node > 1
    devices = ",".join(map(str, range(options.gpus_per_node)))
    local_devices = [f"export JAX_LOCAL_DEVICE_IDS={devices}"] if one_process else []
    return "\n".join([*activate, "export PYTHONUNBUFFERED=1", *local_devices, *shell.exports(options.env)])


def task_command(options: Options) -> list[str]:
    """The srun command that starts the tasks.

    A task that ends does not end the others, which may still be saving; JAX ends them if one fails. The shell of a task
    survives SIGTERM, so that the step lasts until the command has saved.
    """
    step = ["srun", "--export=ALL", "--label", "--kill-on-bad-exit=0"]
    cpus = [f"--cpus-per-task={options.cpus_per_task}"] if options.cpus_per_task else []  # not inherited from sbatch
    gpus = ["--gpu-bind=none"] if options.gpus_per_node else []
    container = []
    if options.container:
        nvidia = ["--nv"] if options.gpus_per_node else []
        image = options.container if "://" in options.container else str(Path(options.container).absolute())
        tree = str(shell.REPOSITORY)
        container = ["apptainer", "exec", *nvidia, f"--bind={tree}", f"--pwd={tree}", image]
    return [*step, *cpus, *gpus, *container, "bash", "-c", f"trap : TERM; {options.command}"]


def submit_commands(options: Options) -> list[list[str]]:
    """Submits the batch script, which sbatch reads from standard input."""
    optional = {
        "--cpus-per-task": options.cpus_per_task,
        "--gpus-per-node": options.gpus_per_node,
        "--partition": options.partition,
        "--account": options.account,
    }
    sbatch = [
        "sbatch",
        f"--job-name={options.name}",
        f"--nodes={options.nodes}",
        f"--ntasks-per-node={options.tasks}",
        *(f"{name}={value}" for name, value in optional.items() if value),
        f"--time={options.time}",
        f"--signal=B:TERM@{options.signal_seconds}",
        "--requeue" if options.requeue else "--no-requeue",
        "--dependency=singleton",
        f"--chdir={shell.REPOSITORY}",
        f"--output={str(options.log).replace('%', '%%')}",
        "--open-mode=append",
        *options.option,
    ]
    return [["mkdir", "-p", str(options.log.parent)], sbatch]


def status_commands(options: Options) -> list[list[str]]:
    """Prints the user's jobs of this name that have not ended."""
    return [["squeue", f"--user={getpass.getuser()}", f"--name={options.name}"]]


def logs_commands(options: Options) -> list[list[str]]:
    """Prints the end of the log."""
    return [["tail", "-n", str(shell.TAIL_LINES), str(options.log)]]


def cancel_commands(options: Options) -> list[list[str]]:
    """Cancels the user's jobs of this name that wait, and lets the one that runs save."""
    jobs = ["scancel", f"--user={getpass.getuser()}", f"--name={options.name}"]
    return [[*jobs, "--state=PENDING"], [*jobs, "--state=RUNNING", "--batch", "--signal=USR1"]]


COMMANDS = {"submit": submit_commands, "status": status_commands, "logs": logs_commands, "cancel": cancel_commands}


def main() -> None:
    """Prints or runs the commands for the action."""
    options = shell.read_options(Options)
    check(options)
    submits = options.action == "submit"
    if submits and not _DRY_RUN.value:
        check_software(options)
    shell.perform(COMMANDS[options.action](options), _DRY_RUN.value, batch_script(options) if submits else "")


if __name__ == "__main__":
    run(main)
