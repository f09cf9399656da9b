"""Shared by the launchers: checks of flags, the archive of the working tree, shell lines for remote hosts.

A launcher makes a list of commands from its options, then prints or runs them. Shell lines for remote hosts are POSIX
shell. In them, `tree` is the project's directory on the host, relative to the home directory or absolute, and `run_dir`
is the directory of `run.log` and `run.pid`, relative to the tree.
"""

import dataclasses
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from absl import flags

from msn_jax.cli import InputError

T = TypeVar("T")
REPOSITORY = Path(__file__).resolve().parent.parent
NOT_COPIED = ("./.git", "./.venv", "./runs", "./build", "__pycache__", "*.egg-info", ".*_cache", ".hypothesis")
TAIL_LINES = 50  # that `--action=logs` prints


# --- Options


def read_options(kind: type[T]) -> T:
    """An instance of the dataclass `kind`, each field with the value of the flag of the same name, lists as tuples."""
    values = {field.name: flags.FLAGS[field.name].value for field in dataclasses.fields(kind)}
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def check_required(options: object, required: Iterable[str]) -> None:
    """Raises InputError for a missing or blank flag; `options` has the fields `action` and those of `required`."""
    for flag in required:
        if not getattr(options, flag).strip():
            raise InputError(f"--action={options.action} needs --{flag}")


def check_unused(options: object, used: Mapping[str, Iterable[str]]) -> None:
    """Raises InputError for a flag that only other actions use. `used`: action -> its flags.

    A flag counts as given if its value differs from the default of its field in the dataclass of `options`.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(options)}
    for flag in sorted(set().union(*used.values()) - set(used[options.action])):
        if getattr(options, flag) != defaults[flag]:
            raise InputError(f"--{flag} is not used by --action={options.action}: remove it")


def check_env(env: Sequence[str]) -> None:
    """Raises InputError unless every element is NAME=VALUE."""
    for pair in env:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*=.*", pair, re.DOTALL):
            raise InputError(f"--env={pair}: use NAME=VALUE")


# --- Shell lines


def archive_commands(archive: Path, excluded: Sequence[str]) -> list[list[str]]:
    """Local commands that pack the working tree without the paths that match the patterns `excluded`."""
    exclude = [f"--exclude={pattern}" for pattern in excluded]
    return [
        ["mkdir", "-p", str(archive.parent)],
        ["tar", "-czf", str(archive), *exclude, "-C", str(REPOSITORY), "."],
    ]


def setup_line(tree: str, archive: str, extra: str) -> str:
    """Unpacks the archive into `tree` and installs the project, with the extra `extra`, in `tree`/.venv."""
    has_new_python = 'python3 -c "import ensurepip, sys; sys.exit(sys.version_info < (3, 11))"'
    uv = "curl -LsSf https://astral.sh/uv/install.sh | sh && ~/.local/bin/uv venv --seed --python=3.12 .venv"
    new_environment = f"if {has_new_python}; then python3 -m venv .venv; else {uv}; fi"
    steps = [
        f"mkdir -p {tree}",
        f"tar -xzf {archive} -C {tree}",
        f"cd {tree}",
        f"{{ test -x .venv/bin/python || {new_environment}; }}",
        f".venv/bin/python -m pip install -e '.[{extra}]'",
    ]
    return " && ".join(steps)


def exports(env: Sequence[str]) -> list[str]:
    """The shell commands that export each NAME=VALUE of `env`."""
    return [f"export {name}={shlex.quote(value)}" for name, _, value in (pair.partition("=") for pair in env)]


def run_line(tree: str, run_dir: str, is_active: str, command: str, env: Sequence[str]) -> str:
    """Starts `command`, unchanged, in a second shell, unless the condition `is_active` holds in the tree.

    The second shell leads its own session, so that it outlives the connection and `run.pid` identifies its process
    group. It also survives SIGTERM, to log the exit code of the command.
    """
    log, pid = f"{run_dir}/run.log", f"{run_dir}/run.pid"
    refusal = f'{{ echo "$(hostname): a run is active, see {tree}/{pid}" >&2; exit 1; }}'
    script = f'trap : TERM; trap "echo exit code: \\$?" EXIT; {command}'
    steps = [
        f"cd {tree}",
        f"mkdir -p {run_dir}",
        f"{{ ! {is_active} || {refusal}; }}",
        ". .venv/bin/activate",
        "export PYTHONUNBUFFERED=1",
        *exports(env),
        f"{{ setsid bash -c {shlex.quote(script)} >>{log} 2>&1 </dev/null & echo $! >{pid}; }}",
    ]
    return " && ".join(steps)


# --- Running


def perform(commands: Sequence[Sequence[str]], dry_run: bool, stdin: str = "") -> None:
    """Prints the commands, if `dry_run`, or runs them. The last one reads `stdin`, if any."""
    if dry_run:
        print(as_text(commands, stdin))
    else:
        execute(commands, stdin)


def as_text(commands: Sequence[Sequence[str]], stdin: str) -> str:
    """The commands for a shell, one per line, `stdin` as a here-document."""
    text = "\n".join(map(shlex.join, commands))
    if not stdin:
        return text
    end = "END"
    while end in stdin.splitlines():
        end += "_"
    return f"{text} <<'{end}'\n{stdin}{end}"


def execute(commands: Sequence[Sequence[str]], stdin: str) -> None:
    """Runs the commands in order. Exits with code 1 and names the command if one fails."""
    for number, argv in enumerate(commands, start=1):
        print("+", shlex.join(argv), file=sys.stderr, flush=True)
        text = stdin if stdin and number == len(commands) else None
        try:
            code = subprocess.run(argv, input=text, text=True).returncode
        except FileNotFoundError:
            sys.exit(f"error: {argv[0]} is not on the PATH, cannot run: {shlex.join(argv)}")
        if code != 0:
            sys.exit(f"error: exit code {code} from: {shlex.join(argv)}")
