r"""Runs the project on one remote GPU host, through `ssh` and `scp`.

An example; `gpu1` is a host of ~/.ssh/config, or USER@ADDRESS:

    python launch/gpu_host.py --host=gpu1 --action=setup
    python launch/gpu_host.py --host=gpu1 --action=run \
        --command='python -m msn_jax.train --config=configs/X.py --workdir=runs/x'
    python launch/gpu_host.py --host=gpu1 --action=logs
    python launch/gpu_host.py --host=gpu1 --action=stop

`setup` copies the working tree to `--directory` and installs it, with the extra `cuda`, in a virtual environment there.
`--dry_run` prints the commands, quoted for a shell, and runs nothing.

Notes:

  * `--command` is a shell line, interpreted on the host: in single quotes, `$HOME` is the host's. It starts in the
    copied tree, in the virtual environment, with the variables of `--env=NAME=VALUE`. JAX uses all GPUs that it sees;
    `--env=CUDA_VISIBLE_DEVICES=0,1` selects some.
  * The run survives a lost connection. Its log ends with the line `exit code: N`. A second run in the same directory is
    refused while the first is active.
  * `stop` sends SIGTERM: the train program saves and exits with code 143, and the same `run` resumes it.
  * Models, runs and other files that git ignores are not copied.
  * The host needs Linux, an NVIDIA driver for CUDA 13, bash, and a POSIX login shell. Without Python 3.11 or newer,
    `setup` installs one with uv. The local machine needs ssh, scp, tar and absl-py, but not JAX.
"""

import dataclasses
import re
import sys
from pathlib import Path

from absl import flags

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout, without JAX installed

from launch import shell
from msn_jax.cli import InputError, run

ACTIONS = {"setup": (), "run": ("command", "env"), "logs": (), "stop": ()}  # action -> its own flags
REQUIRED = {"run": ("command",)}
RUN_DIR = "runs/gpu_host"  # in the tree, locally and on the host
# A shell condition, in the tree: `run.pid` is the shell of a run, not another process since a reboot, and not a zombie,
# which an ended run remains in a container whose process 1 does not wait for orphans.
IS_ACTIVE = f'grep -qs "echo exit code" "/proc/$(cat {RUN_DIR}/run.pid 2>/dev/null)/cmdline"'
NOT_COPIED = (*shell.NOT_COPIED, "./models", ".ipynb_checkpoints")  # what git ignores

flags.DEFINE_enum("action", None, list(ACTIONS), "What to do.", required=True)
flags.DEFINE_string("host", "", "The GPU host, as ssh takes it: a host of ~/.ssh/config, or USER@ADDRESS.")
flags.DEFINE_string("directory", "msn_jax", "Directory of the project on the host, relative to the home directory.")
flags.DEFINE_string("command", "", "run: shell line for the host.")
flags.DEFINE_multi_string("env", [], "run: NAME=VALUE for the command; may be repeated.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the commands, one per line, and run nothing.")


@dataclasses.dataclass(frozen=True)
class Options:
    """The values of all flags except `--dry_run`."""

    action: str
    host: str
    directory: str
    command: str = ""
    env: tuple[str, ...] = ()


def check(options: Options) -> None:
    """Raises InputError for a flag that is missing, malformed or unused by the action."""
    shell.check_required(options, ("host", *REQUIRED.get(options.action, ())))
    if not re.fullmatch(r"(\w[\w.-]*@)?\w[\w.-]*", options.host, re.ASCII):
        raise InputError(f"--host={options.host}: use a host of ~/.ssh/config, or USER@ADDRESS")
    if not re.fullmatch(r"/?(\w[\w.-]*/)*\w[\w.-]*", options.directory, re.ASCII):
        raise InputError(
            f"--directory={options.directory}: use a path of letters, digits and ._-, absolute or relative to the home "
            "directory"
        )
    shell.check_unused(options, ACTIONS)
    shell.check_env(options.env)


def ssh(options: Options, remote: str) -> list[str]:
    """The command that runs the shell line `remote` in the login shell of the host."""
    return ["ssh", options.host, remote]


def setup_commands(options: Options) -> list[list[str]]:
    """Copies the working tree and installs it. Repeat after a change of the sources.

    Overwrites files of an earlier copy and removes nothing.
    """
    local = shell.REPOSITORY / RUN_DIR / f"{options.host}.tar.gz"
    remote = f"{options.directory}.tar.gz"
    return [
        *shell.archive_commands(local, NOT_COPIED),
        ssh(options, f"mkdir -p {options.directory}"),
        ["scp", str(local), f"{options.host}:{remote}"],
        ssh(options, shell.setup_line(options.directory, remote, "cuda")),
    ]


def run_commands(options: Options) -> list[list[str]]:
    """Starts the command in the background."""
    return [ssh(options, shell.run_line(options.directory, RUN_DIR, IS_ACTIVE, options.command, options.env))]


def logs_commands(options: Options) -> list[list[str]]:
    """Prints the end of the log."""
    return [ssh(options, f"tail -n {shell.TAIL_LINES} {options.directory}/{RUN_DIR}/run.log")]


def stop_commands(options: Options) -> list[list[str]]:
    """Sends SIGTERM to all processes of the active run; fails if none is active."""
    refusal = '{ echo "$(hostname): no run is active" >&2; exit 1; }'
    kill = f'kill -- "-$(cat {RUN_DIR}/run.pid)"'
    return [ssh(options, f"cd {options.directory} && {{ {IS_ACTIVE} || {refusal}; }} && {kill}")]


COMMANDS = {"setup": setup_commands, "run": run_commands, "logs": logs_commands, "stop": stop_commands}


def main() -> None:
    """Prints or runs the commands for the action."""
    options = shell.read_options(Options)
    check(options)
    shell.perform(COMMANDS[options.action](options), _DRY_RUN.value)


if __name__ == "__main__":
    run(main)
