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
import sys
from pathlib import Path

from absl import flags

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout, without JAX installed

from launch import shell
from msn_jax.cli import InputError, check_directory, run

ACTIONS = {  # action -> its flags in addition to --name, --zone and --project
    "create": ("type", "version", "spot", "queued"),
    "setup": (),
    "run": ("command", "env"),
    "logs": ("logs_dir", "type"),
    "delete": ("queued",),
}
REQUIRED = {"create": ("type", "version"), "run": ("command",)}

flags.DEFINE_enum("action", None, list(ACTIONS), "What to do.", required=True)
flags.DEFINE_string("name", "", "Name of the TPU VM (and of its queued resource).")
flags.DEFINE_string("zone", "", "Zone of the TPU VM, such as us-central2-b.")
flags.DEFINE_string("project", "", "Google Cloud project; default: gcloud's own setting.")
flags.DEFINE_string("type", "", "create, logs: accelerator type, such as v5litepod-8 or v4-32.")
flags.DEFINE_string("version", "", "create: TPU runtime version, such as v2-alpha-tpuv5-lite.")
flags.DEFINE_bool("spot", False, "create: a spot VM, cheaper but preemptible.")
flags.DEFINE_bool("queued", False, "create, delete: use a queued resource.")
flags.DEFINE_string("command", "", "run: shell line for every worker.")
flags.DEFINE_multi_string("env", [], "run: NAME=VALUE for the command; may be repeated.")
flags.DEFINE_string("logs_dir", "", "logs: copy every worker's log to this directory; needs --type.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the commands, one per line, and run nothing.")

# On a worker, relative to the home directory.
REMOTE_ARCHIVE = "msn_jax.tar.gz"
REMOTE_TREE = "msn_jax"
# In the tree, locally and on a worker. The archive excludes `runs`.
RUN_DIR = "runs/tpu_vm"
IS_ACTIVE = f'kill -0 "$(cat {RUN_DIR}/run.pid 2>/dev/null)" 2>/dev/null'  # a shell condition, in the tree

CORES_PER_HOST = {"v2": 8, "v3": 8, "v4": 8, "v5p": 8}  # these types count TensorCores
CHIPS_PER_HOST = {"v5litepod": 4, "v6e": 4}  # these count chips; up to eight of them share one host


@dataclasses.dataclass(frozen=True)
class Options:
    """The values of all flags except `--dry_run`."""

    action: str
    name: str = ""
    zone: str = ""
    project: str = ""
    type: str = ""
    version: str = ""
    spot: bool = False
    queued: bool = False
    command: str = ""
    env: tuple[str, ...] = ()
    logs_dir: str = ""


def check(options: Options) -> None:
    """Raises InputError for a flag that is missing, malformed or unused by the action."""
    shell.check_required(options, ("name", "zone", *REQUIRED.get(options.action, ())))
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", options.name):
        raise InputError(f"--name={options.name}: use up to 63 lower-case letters, digits and hyphens, a letter first")
    shell.check_unused(options, ACTIONS)
    shell.check_env(options.env)
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
    archive = shell.REPOSITORY / RUN_DIR / f"{options.name}.tar.gz"
    return [
        *shell.archive_commands(archive, shell.NOT_COPIED),
        gcloud(options, "tpu-vm", "scp", str(archive), f"{options.name}:{REMOTE_ARCHIVE}", "--worker=all"),
        ssh(options, shell.setup_line(REMOTE_TREE, REMOTE_ARCHIVE, "tpu")),
    ]


def run_commands(options: Options) -> list[list[str]]:
    """Starts the command on every worker, in the background."""
    return [ssh(options, shell.run_line(REMOTE_TREE, RUN_DIR, IS_ACTIVE, options.command, options.env))]


def logs_commands(options: Options) -> list[list[str]]:
    """Prints the end of every worker's log, with the host's name before each line; or copies the logs."""
    log = f"{REMOTE_TREE}/{RUN_DIR}/run.log"
    if not options.logs_dir:
        return [ssh(options, f'set -o pipefail; tail -n {shell.TAIL_LINES} {log} | sed "s/^/$(hostname): /"')]
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


def main() -> None:
    """Prints or runs the commands for the action."""
    options = shell.read_options(Options)
    check(options)
    shell.perform(COMMANDS[options.action](options), _DRY_RUN.value)


if __name__ == "__main__":
    run(main)
