r"""Runs the project on Google Cloud TPU VMs, single hosts and pods, through `gcloud compute tpus tpu-vm`.

An example with one host and eight v5e chips; a shell variable has the flags common to all actions:

    TPU="python launch/tpu_vm.py --name=msn --zone=us-west4-a --project=my-project"
    $TPU --action=create --type=v5litepod-8 --version=v2-alpha-tpuv5-lite --spot
    $TPU --action=setup
    $TPU --action=run --command="python -m msn_jax.train --config=configs/X.py --workdir=/mnt/shared/x"
    $TPU --action=logs
    $TPU --action=delete

For a pod, here 16 chips on four hosts, only the first command differs:

    $TPU --action=create --type=v4-32 --version=tpu-ubuntu2204-base

With `--queued`, create and delete use a queued resource: the request waits for capacity, and
`gcloud compute tpus queued-resources describe msn` shows when it is ACTIVE. With `--logs_dir=DIR --type=v4-32`, logs
copies the complete log of every worker; otherwise it prints the last lines of each. `--dry_run` prints the commands,
quoted for a shell, and runs nothing.

Notes:

  * `--command` is a shell line, interpreted on the worker: in single quotes, `$HOME` is the worker's. It starts in the
    copied tree, in the virtual environment, with the variables of `--env=NAME=VALUE`.
  * Every worker runs the same command, as JAX requires. On a pod, pass `--distributed` to it: the program then joins
    `jax.distributed` and waits for all hosts.
  * On a pod, `--workdir` must be on a file system that all workers mount (Filestore, or a bucket through Cloud Storage
    FUSE). A worker's own disk is not shared, and is deleted with the worker.
  * The run survives a lost connection. Its log ends with the line `exit code: N`. A second run is refused while the
    first is active; to stop one (the train program saves on SIGTERM):
    gcloud compute tpus tpu-vm ssh msn --zone=... --worker=all --command='kill -- -$(cat msn_jax/runs/tpu_vm/run.pid)'
  * Runtime versions: v4 and older tpu-ubuntu2204-base, v5e v2-alpha-tpuv5-lite, v5p v2-alpha-tpuv5, v6e
    v2-alpha-tpuv6e. They have Python 3.10, too old for a recent JAX; `setup` then installs a newer one with uv.
  * To reach several workers, gcloud needs its key in the SSH agent: `ssh-add ~/.ssh/google_compute_engine`.
  * The local machine needs gcloud, tar and absl-py, but not JAX. `tpu-vm` does not support TPU7x and later.
"""

import dataclasses
import re
import shlex
import subprocess
import sys
from pathlib import Path

from absl import flags

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))  # the script runs from a checkout, without JAX installed

from msn_jax.cli import InputError, check_directory, run  # noqa: E402

ACTIONS = {  # action -> its flags in addition to --name, --zone and --project
    "create": ("type", "version", "spot", "queued"),
    "setup": (),
    "run": ("command", "env"),
    "logs": ("logs_dir", "type"),
    "delete": ("queued",),
}
REQUIRED = {"create": ("type", "version"), "run": ("command",)}

_ACTION = flags.DEFINE_enum("action", None, list(ACTIONS), "What to do.", required=True)
_NAME = flags.DEFINE_string("name", "", "Name of the TPU VM (and of its queued resource).")
_ZONE = flags.DEFINE_string("zone", "", "Zone of the TPU VM, such as us-central2-b.")
_PROJECT = flags.DEFINE_string("project", "", "Google Cloud project; default: gcloud's own setting.")
_TYPE = flags.DEFINE_string("type", "", "create, logs: accelerator type, such as v5litepod-8 or v4-32.")
_VERSION = flags.DEFINE_string("version", "", "create: TPU runtime version, such as v2-alpha-tpuv5-lite.")
_SPOT = flags.DEFINE_bool("spot", False, "create: a spot VM, cheaper but preemptible.")
_QUEUED = flags.DEFINE_bool("queued", False, "create, delete: use a queued resource.")
_COMMAND = flags.DEFINE_string("command", "", "run: shell line for every worker.")
_ENV = flags.DEFINE_multi_string("env", [], "run: NAME=VALUE for the command; may be repeated.")
_LOGS_DIR = flags.DEFINE_string("logs_dir", "", "logs: copy every worker's log to this directory; needs --type.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the commands, one per line, and run nothing.")

# On a worker, relative to the home directory.
REMOTE_ARCHIVE = "msn_jax.tar.gz"
REMOTE_TREE = "msn_jax"
# In the tree, locally and on a worker. The archive excludes `runs`.
RUN_DIR = "runs/tpu_vm"
NOT_COPIED = ("./.git", "./.venv", "./runs", "./build", "__pycache__", "*.egg-info", ".*_cache", ".hypothesis")
TAIL_LINES = 50

CORES_PER_HOST = {"v2": 8, "v3": 8, "v4": 8, "v5p": 8}  # these types count TensorCores
CHIPS_PER_HOST = {"v5litepod": 4, "v6e": 4}  # these count chips; up to eight of them share one host


@dataclasses.dataclass(frozen=True)
class Options:
    """The values of all flags except `--dry_run`."""

    action: str
    name: str
    zone: str
    project: str
    type: str
    version: str
    spot: bool
    queued: bool
    command: str
    env: tuple[str, ...]
    logs_dir: str


def check(options: Options) -> None:
    """Raises InputError for a flag that is missing, malformed or unused by the action."""
    for flag in ("name", "zone", *REQUIRED.get(options.action, ())):
        if not getattr(options, flag).strip():
            raise InputError(f"--action={options.action} needs --{flag}")
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", options.name):
        raise InputError(f"--name={options.name}: use up to 63 lower-case letters, digits and hyphens, a letter first")
    for flag in sorted(set().union(*ACTIONS.values()) - set(ACTIONS[options.action])):
        if getattr(options, flag):
            raise InputError(f"--{flag} is not used by --action={options.action}: remove it")
    for pair in options.env:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*=.*", pair, re.DOTALL):
            raise InputError(f"--env={pair}: use NAME=VALUE")
    if options.action == "logs" and bool(options.logs_dir) != bool(options.type):
        raise InputError("--logs_dir and --type go together: the number of logs to copy follows from the type")
    if options.logs_dir:
        check_directory(options.logs_dir, f"--logs_dir={options.logs_dir}")


def worker_count(accelerator_type: str) -> int:
    """Number of hosts of an accelerator type: 1 for 'v5litepod-8', 4 for 'v4-32'."""
    generation, _, size = accelerator_type.rpartition("-")
    if size.isdecimal() and generation in CORES_PER_HOST:
        return max(1, int(size) // CORES_PER_HOST[generation])
    if size.isdecimal() and generation in CHIPS_PER_HOST:
        return 1 if int(size) <= 8 else int(size) // CHIPS_PER_HOST[generation]
    known = ", ".join([*CORES_PER_HOST, *CHIPS_PER_HOST])
    raise InputError(f"--type={accelerator_type}: expected GENERATION-SIZE, with a generation of {known}")


def gcloud(options: Options, group: str, verb: str, *arguments: str) -> list[str]:
    """`gcloud compute tpus GROUP VERB ...` in the zone and project of the options."""
    location = [f"--zone={options.zone}", *([f"--project={options.project}"] if options.project else [])]
    return ["gcloud", "compute", "tpus", group, verb, *arguments, *location]


def ssh(options: Options, remote: str) -> list[str]:
    """The command that runs the shell line `remote` in the login shell of every worker."""
    return gcloud(options, "tpu-vm", "ssh", options.name, "--worker=all", f"--command={remote}")


def create_commands(options: Options) -> list[list[str]]:
    """Creates the TPU VM, or a queued resource whose only node has the same name."""
    spot = ["--spot"] if options.spot else []
    accelerator = f"--accelerator-type={options.type}"
    if options.queued:
        node = [f"--node-id={options.name}", accelerator, f"--runtime-version={options.version}"]
        return [gcloud(options, "queued-resources", "create", options.name, *node, *spot)]
    return [gcloud(options, "tpu-vm", "create", options.name, accelerator, f"--version={options.version}", *spot)]


def setup_commands(options: Options) -> list[list[str]]:
    """Copies the working tree to every worker and installs it. Repeat after a change of the sources.

    Overwrites files of an earlier copy and removes nothing.
    """
    folder = REPOSITORY / RUN_DIR
    archive = str(folder / f"{options.name}.tar.gz")
    excluded = [f"--exclude={pattern}" for pattern in NOT_COPIED]
    return [
        ["mkdir", "-p", str(folder)],
        ["tar", "-czf", archive, *excluded, "-C", str(REPOSITORY), "."],
        gcloud(options, "tpu-vm", "scp", archive, f"{options.name}:{REMOTE_ARCHIVE}", "--worker=all"),
        ssh(options, setup_line()),
    ]


def setup_line() -> str:
    """Shell line with which a worker unpacks and installs the copied tree."""
    has_new_python = 'python3 -c "import ensurepip, sys; sys.exit(sys.version_info < (3, 11))"'
    uv = "curl -LsSf https://astral.sh/uv/install.sh | sh && ~/.local/bin/uv venv --seed --python=3.12 .venv"
    new_environment = f"if {has_new_python}; then python3 -m venv .venv; else {uv}; fi"
    steps = [
        f"mkdir -p {REMOTE_TREE}",
        f"tar -xzf {REMOTE_ARCHIVE} -C {REMOTE_TREE}",
        f"cd {REMOTE_TREE}",
        f"{{ test -x .venv/bin/python || {new_environment}; }}",
        ".venv/bin/python -m pip install -e '.[tpu]'",
    ]
    return " && ".join(steps)


def run_commands(options: Options) -> list[list[str]]:
    """Starts the command on every worker, in the background."""
    return [ssh(options, run_line(options.command, options.env))]


def run_line(command: str, env: tuple[str, ...]) -> str:
    """Shell line with which a worker starts `command`, unchanged, in a second shell.

    The second shell leads its own session, so that it outlives the connection and `run.pid` identifies its process
    group. It also survives SIGTERM, to log the exit code of the command.
    """
    log, pid = f"{RUN_DIR}/run.log", f"{RUN_DIR}/run.pid"
    still_running = f'kill -0 "$(cat {pid} 2>/dev/null)" 2>/dev/null'
    refusal = f'{{ echo "$(hostname): a run is active, see {REMOTE_TREE}/{pid}" >&2; exit 1; }}'
    script = f'trap : TERM; trap "echo exit code: \\$?" EXIT; {command}'
    exports = [f"export {name}={shlex.quote(value)}" for name, _, value in (pair.partition("=") for pair in env)]
    steps = [
        f"cd {REMOTE_TREE}",
        f"mkdir -p {RUN_DIR}",
        f"{{ ! {still_running} || {refusal}; }}",
        ". .venv/bin/activate",
        "export PYTHONUNBUFFERED=1",
        *exports,
        f"{{ setsid bash -c {shlex.quote(script)} >>{log} 2>&1 </dev/null & echo $! >{pid}; }}",
    ]
    return " && ".join(steps)


def logs_commands(options: Options) -> list[list[str]]:
    """Prints the end of every worker's log, with the host's name before each line; or copies the logs."""
    log = f"{REMOTE_TREE}/{RUN_DIR}/run.log"
    if not options.logs_dir:
        return [ssh(options, f'set -o pipefail; tail -n {TAIL_LINES} {log} | sed "s/^/$(hostname): /"')]
    folder = Path(options.logs_dir).absolute()
    copies = [  # gcloud copies from one worker at a time
        gcloud(
            options,
            "tpu-vm",
            "scp",
            f"{options.name}:{log}",
            str(folder / f"worker-{worker}.log"),
            f"--worker={worker}",
        )
        for worker in range(worker_count(options.type))
    ]
    return [["mkdir", "-p", str(folder)], *copies]


def delete_commands(options: Options) -> list[list[str]]:
    """Deletes the TPU VM, or the queued resource with its node, without confirmation."""
    if options.queued:
        return [gcloud(options, "queued-resources", "delete", options.name, "--force", "--quiet")]
    return [gcloud(options, "tpu-vm", "delete", options.name, "--quiet")]


COMMANDS = {
    "create": create_commands,
    "setup": setup_commands,
    "run": run_commands,
    "logs": logs_commands,
    "delete": delete_commands,
}


def execute(commands: list[list[str]]) -> None:
    """Runs the commands in order. Exits with code 1 and names the command if one fails."""
    for argv in commands:
        print("+", shlex.join(argv), file=sys.stderr, flush=True)
        try:
            code = subprocess.run(argv).returncode
        except FileNotFoundError:
            sys.exit(f"error: {argv[0]} is not on the PATH, cannot run: {shlex.join(argv)}")
        if code != 0:
            sys.exit(f"error: exit code {code} from: {shlex.join(argv)}")


def main() -> None:
    """Prints or runs the commands for the action."""
    options = Options(
        action=_ACTION.value,
        name=_NAME.value,
        zone=_ZONE.value,
        project=_PROJECT.value,
        type=_TYPE.value,
        version=_VERSION.value,
        spot=_SPOT.value,
        queued=_QUEUED.value,
        command=_COMMAND.value,
        env=tuple(_ENV.value),
        logs_dir=_LOGS_DIR.value,
    )
    check(options)
    commands = COMMANDS[options.action](options)
    if _DRY_RUN.value:
        print("\n".join(map(shlex.join, commands)))
    else:
        execute(commands)


if __name__ == "__main__":
    run(main)
