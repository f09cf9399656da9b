r"""Runs the project on Google Cloud TPU VMs, single hosts and pods, through `gcloud compute tpus tpu-vm`.

A session: one host with eight v5e chips. Flags common to all actions are kept in a shell variable.

    TPU="python launch/tpu_vm.py --name=msn --zone=us-west4-a --project=my-project"
    $TPU --action=create --type=v5litepod-8 --version=v2-alpha-tpuv5-lite --spot
    $TPU --action=setup
    $TPU --action=run --command="python -m msn_jax.train --config=configs/X.py --workdir=/mnt/shared/x"
    $TPU --action=logs
    $TPU --action=delete

A pod differs in its first command only, here 16 chips on four hosts; the other four are the same:

    $TPU --action=create --type=v4-32 --version=tpu-ubuntu2204-base

`--queued` on create and delete asks for a queued resource instead: the request waits until there is capacity, and
`gcloud compute tpus queued-resources describe msn` says when it is ACTIVE. `--logs_dir=DIR --type=v4-32` on logs
copies the whole log of every worker; without them the last lines of each are printed. `--dry_run` prints the
commands, quoted for a shell, and runs nothing.

What to know:

  * `--command` is a shell line, as it would be typed on the worker: put it in single quotes here and `$HOME` is the
    worker's. It starts in the copied tree, inside the virtual environment, with the variables of `--env=NAME=VALUE`.
  * The same command runs on every worker, and it must: on a pod give it `--distributed`, with which the program joins
    `jax.distributed` and waits for all the hosts.
  * On a pod `--workdir` is on a file system that all workers mount (Filestore, or a bucket through Cloud Storage
    FUSE); the disk of a worker is seen by that worker alone, and goes with it.
  * The run survives the connection. Its log ends with the line `exit code: N`. A second run is refused while the
    first goes on; to stop one (the train program saves when it gets SIGTERM):
    gcloud compute tpus tpu-vm ssh msn --zone=... --worker=all --command='kill -- -$(cat msn_jax/runs/tpu_vm/run.pid)'
  * Runtime versions: v4 and older tpu-ubuntu2204-base, v5e v2-alpha-tpuv5-lite, v5p v2-alpha-tpuv5, v6e
    v2-alpha-tpuv6e. They bring Python 3.10, too old for a recent JAX; `setup` then fetches a newer one with uv.
  * gcloud reaches several workers at once only with its key in the agent: `ssh-add ~/.ssh/google_compute_engine`.
  * This machine needs gcloud, tar and absl-py, but not JAX. TPU7x and later are not served by `tpu-vm`.
"""

import dataclasses
import re
import shlex
import subprocess
import sys
from pathlib import Path

from absl import flags

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))  # runs from a checkout, without installing the package and its JAX

from msn_jax.cli import InputError, run  # noqa: E402

ACTIONS = {  # action -> the flags it reads besides --name, --zone and --project
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
_PROJECT = flags.DEFINE_string("project", "", "Google Cloud project; gcloud's own setting if not given.")
_TYPE = flags.DEFINE_string("type", "", "create, logs: accelerator type, such as v5litepod-8 or v4-32.")
_VERSION = flags.DEFINE_string("version", "", "create: TPU runtime version, such as v2-alpha-tpuv5-lite.")
_SPOT = flags.DEFINE_bool("spot", False, "create: cheaper, and may be preempted.")
_QUEUED = flags.DEFINE_bool("queued", False, "create, delete: through a queued resource.")
_COMMAND = flags.DEFINE_string("command", "", "run: shell line for every worker.")
_ENV = flags.DEFINE_multi_string("env", [], "run: NAME=VALUE for the command; may be repeated.")
_LOGS_DIR = flags.DEFINE_string("logs_dir", "", "logs: copy every worker's log into this folder; needs --type.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the commands, one per line, and run nothing.")

# On a worker, relative to the home directory, where ssh and scp start.
REMOTE_ARCHIVE = "msn_jax.tar.gz"
REMOTE_TREE = "msn_jax"
# In the tree, here and on a worker. `runs` is not part of the archive.
RUN_DIR = "runs/tpu_vm"
NOT_COPIED = ("./.git", "./.venv", "./runs", "./build", "__pycache__", "*.egg-info", ".*_cache", ".hypothesis")
TAIL_LINES = 50

CORES_PER_HOST = {"v2": 8, "v3": 8, "v4": 8, "v5p": 8}  # these types count TensorCores
CHIPS_PER_HOST = {"v5litepod": 4, "v6e": 4}  # these count chips; up to eight of them share one host


@dataclasses.dataclass(frozen=True)
class Options:
    """The flags of the same names, except `--dry_run`."""

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
    """Raises InputError for a flag that is missing, malformed or without meaning for the action."""
    for flag in ("name", "zone", *REQUIRED.get(options.action, ())):
        if not getattr(options, flag).strip():
            raise InputError(f"--action={options.action} needs --{flag}")
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", options.name):
        raise InputError(f"--name={options.name}: use up to 63 lower-case letters, digits and hyphens, a letter first")
    for flag in sorted(set().union(*ACTIONS.values()) - set(ACTIONS[options.action])):
        if getattr(options, flag):
            raise InputError(f"--{flag} has no meaning with --action={options.action}")
    for pair in options.env:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*=.*", pair, re.DOTALL):
            raise InputError(f"--env={pair}: use NAME=VALUE")
    if options.action == "logs" and bool(options.logs_dir) != bool(options.type):
        raise InputError("--logs_dir and --type go together: the number of logs to copy follows from the type")


def worker_count(accelerator_type: str) -> int:
    """Number of hosts of a TPU of this type: 1 for 'v5litepod-8', 4 for 'v4-32'."""
    generation, _, size = accelerator_type.rpartition("-")
    if size.isdecimal() and generation in CORES_PER_HOST:
        return max(1, int(size) // CORES_PER_HOST[generation])
    if size.isdecimal() and generation in CHIPS_PER_HOST:
        return 1 if int(size) <= 8 else int(size) // CHIPS_PER_HOST[generation]
    known = ", ".join([*CORES_PER_HOST, *CHIPS_PER_HOST])
    raise InputError(f"--type={accelerator_type}: expected GENERATION-SIZE, with a generation of {known}")


def gcloud(options: Options, group: str, verb: str, *arguments: str) -> list[str]:
    """`gcloud compute tpus GROUP VERB ...` in the zone and the project of the options."""
    place = [f"--zone={options.zone}", *([f"--project={options.project}"] if options.project else [])]
    return ["gcloud", "compute", "tpus", group, verb, *arguments, *place]


def ssh(options: Options, remote: str) -> list[str]:
    """The command that has the login shell of every worker interpret `remote`."""
    return gcloud(options, "tpu-vm", "ssh", options.name, "--worker=all", f"--command={remote}")


def create_commands(options: Options) -> list[list[str]]:
    """Asks for the TPU VM: now, or through a queued resource whose one node has the same name."""
    spot = ["--spot"] if options.spot else []
    accelerator = f"--accelerator-type={options.type}"
    if options.queued:
        node = [f"--node-id={options.name}", accelerator, f"--runtime-version={options.version}"]
        return [gcloud(options, "queued-resources", "create", options.name, *node, *spot)]
    return [gcloud(options, "tpu-vm", "create", options.name, accelerator, f"--version={options.version}", *spot)]


def setup_commands(options: Options) -> list[list[str]]:
    """Copies the working tree to every worker and installs it there; again after a change of the sources.

    Files are written over those of an earlier copy, and nothing is removed on the workers.
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
    """What a worker does to unpack and install the copied tree."""
    python_will_do = 'python3 -c "import ensurepip, sys; sys.exit(sys.version_info < (3, 11))"'
    uv = "curl -LsSf https://astral.sh/uv/install.sh | sh && ~/.local/bin/uv venv --seed --python=3.12 .venv"
    new_environment = f"if {python_will_do}; then python3 -m venv .venv; else {uv}; fi"
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
    """What a worker does to start `command`, which a second shell interprets there, exactly as it was given.

    That shell leads a session of its own, so that it outlives the connection and `run.pid` names its whole process
    group. It outlives SIGTERM too, to write down the exit code of the command.
    """
    log, pid = f"{RUN_DIR}/run.log", f"{RUN_DIR}/run.pid"
    still_running = f'kill -0 "$(cat {pid} 2>/dev/null)" 2>/dev/null'
    refusal = f'{{ echo "$(hostname): a run is going on, see {REMOTE_TREE}/{pid}" >&2; exit 1; }}'
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
    """Prints the end of every worker's log, each line behind the host's name; or copies the logs to `--logs_dir`."""
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
    """Deletes the TPU VM, or the queued resource with its node, without a question."""
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
    """Runs the commands in order; exits with 1 at the first that fails, naming it."""
    for argv in commands:
        print("+", shlex.join(argv), file=sys.stderr, flush=True)
        try:
            code = subprocess.run(argv).returncode
        except FileNotFoundError:
            sys.exit(f"error: {argv[0]} is not on the PATH, cannot run: {shlex.join(argv)}")
        if code != 0:
            sys.exit(f"error: exit code {code} from: {shlex.join(argv)}")


def main() -> None:
    """Builds the action's commands from the flags, and prints or runs them."""
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
