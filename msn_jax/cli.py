"""What the programs share: flags in, exit codes out, directories made, the processor's name for their reports.

0 done; 1 the work failed (with its stack trace); 2 the user's input was wrong: one line on stderr, no stack trace;
143 training was stopped by SIGTERM and has saved: the same command goes on from there.
"""

import os
import platform
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from absl import app, flags, logging

_CONFIG_MODULE = "config_config"  # what ml_collections calls the module that it makes of the file of --config


class InputError(Exception):
    """The user's input is wrong. The message is one line: what was found, where, and what would do."""


def cannot_make(name: str, error: OSError) -> InputError:
    """What is raised where no directory can be made; the message calls it `name`."""
    return InputError(f"{name}: cannot make this directory ({error.strerror}): name another")


def make_directory(path: str | Path, flag: str) -> Path:
    """The directory at `path`, made where it is missing. InputError if that fails or nobody may write there."""
    if not str(path):
        raise InputError(f"{flag}: is empty: name a directory")
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_make(f"{flag}={path}", error) from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise InputError(f"{flag}={path}: no permission to write in this directory: name another")
    return Path(path)


def processor() -> str:
    """The CPU's name."""
    try:  # Linux
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _parse_flags(argv: list[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    except Exception as error:  # a config file runs when its flag is parsed, and may raise anything
        raise InputError(_problem(error, argv)) from error


def _problem(error: Exception, argv: list[str]) -> str:
    """What is wrong with a flag, or with the config file that one names, in which case its line."""
    flag = next((argument for argument in argv if argument.startswith("--config=")), "--config")
    cause: BaseException | None = error
    while cause is not None:
        frames = traceback.walk_tb(cause.__traceback__)
        lines = [line for frame, line in frames if frame.f_globals.get("__name__") == _CONFIG_MODULE]
        if isinstance(cause, SyntaxError) and not lines:
            lines = [cause.lineno]
        if lines:
            return f"{flag}: line {lines[-1]}: {type(cause).__name__}: {cause}"
        cause = cause.__context__
    message = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    if isinstance(error, flags.Error) and "Traceback" not in message:
        return message
    return f"{flag}: {message.strip().splitlines()[-1] if message.strip() else type(error).__name__}"


def run(main: Callable[[], None]) -> None:
    """Parses the flags, calls `main()` and exits with the project's exit codes."""

    def guarded(argv: list[str]) -> None:
        if len(argv) > 1:
            raise InputError(f"unexpected argument {argv[1]!r}: every option is a flag, --name=value")
        for flag in flags.FLAGS.get_key_flags_for_module(sys.argv[0]):
            if flag.present and flag.value == "":
                raise InputError(f"--{flag.name}: is empty")
        main()

    logging.set_verbosity(logging.ERROR)  # JAX and Orbax tell of backends that they did not find, and the like
    try:
        app.run(guarded, flags_parser=_parse_flags)
    except InputError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
