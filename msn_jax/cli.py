"""Shared by all programs: flags, exit codes, checks of directories, warnings, status, the cache of compiled programs.

Exit codes: 0 success; 1 the work failed (with a stack trace); 2 invalid input: one line on stderr, no stack trace;
143 training received SIGTERM and saved its state: the same command resumes it.
"""

import contextlib
import errno
import functools
import os
import platform
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from absl import app, flags, logging

T = TypeVar("T")
MAX_NAME_BYTES = 255  # of one component of a path, on every common file system
_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "msn_jax" / "compilation"
_MIN_COMPILE_SECONDS = 0.01  # programs that compile faster are not stored
_CONFIG_MODULE = "config_config"  # the module name that ml_collections gives to the file of --config


flags.DEFINE_string(
    "compilation_cache",
    str(_CACHE),
    "Directory of compiled programs for later runs; empty: none. JAX_COMPILATION_CACHE_DIR takes precedence.",
)


class InputError(Exception):
    """The user's input is invalid. The message is one line: what was given, where, and what would work."""


def cannot_make(name: str, error: OSError) -> InputError:
    """The error for a directory that cannot be made; its message refers to the directory as `name`."""
    return InputError(f"{name}: cannot make this directory ({error.strerror}): name another")


def check_directory(path: str | Path, name: str) -> None:
    """Refuses a directory that cannot be made or written to. Leaves nothing behind.

    Args:
      path: the directory, which may exist.
      name: how the message refers to it, such as `--workdir=runs/x`.

    Raises:
      InputError: the path or one of its parents is a file, is not writable, or has too long a name.
    """
    path = Path(path).absolute()
    if any(len(os.fsencode(part)) > MAX_NAME_BYTES for part in path.parts):
        raise cannot_make(name, OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG)))
    try:
        existing = next(parent for parent in (path, *path.parents) if parent.exists())
    except OSError as error:  # a parent that may not be searched
        raise cannot_make(name, error) from error
    if not existing.is_dir():
        subject = "" if existing == path else f"{existing} "
        raise InputError(f"{name}: {subject}is a file, not a directory: name another")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"{name}: no permission to write in {existing}: name another")
    if existing != path:
        try:  # some file systems, such as /proc, grant the permission but make no directories
            os.rmdir(tempfile.mkdtemp(prefix=".msn_jax-", dir=existing))
        except OSError as error:
            raise cannot_make(name, error) from error


def make_directory(path: str | Path, flag: str) -> Path:
    """Makes the directory named by a flag, unless it exists. InputError if it cannot be made or written to."""
    if not str(path):
        raise InputError(f"{flag}: is empty: name a directory")
    check_directory(path, f"{flag}={path}")
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_make(f"{flag}={path}", error) from error
    return Path(path)


@functools.cache
def warn_once(message: str) -> None:
    """Prints a one-line warning on stderr, the first time that this process gives it."""
    print(f"warning: {message}", file=sys.stderr)


@contextlib.contextmanager
def status(message: str) -> Iterator[None]:
    """Shows a message after the cursor of a terminal while the block runs; elsewhere nothing."""
    if not sys.stderr.isatty():
        yield
        return
    sys.stdout.flush()
    print(f"\x1b7{message} ...", end="", file=sys.stderr, flush=True)  # saves the cursor
    try:
        yield
    finally:
        print("\x1b8\x1b[K", end="", file=sys.stderr, flush=True)  # restores it and clears the rest of the line


def _use_compilation_cache(directory: str) -> None:
    """Stores compiled programs in `directory` for later runs, unless JAX's own variable names another directory."""
    jax = sys.modules.get("jax")  # programs that do not import JAX compile nothing
    if jax is None:
        return
    if directory and jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(Path(directory).expanduser()))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", _MIN_COMPILE_SECONDS)


def read_config(kind: type[T], directory: str) -> T:
    """The config that the file of --config returns.

    Args:
      kind: its type.
      directory: that holds such files, for the error message.

    Raises:
      InputError: --config is missing, its file is missing, or it returns something else.
    """
    if not flags.FLAGS["config"].present:
        raise InputError(f"--config is missing; name a file of {directory}")
    given, flag = flags.FLAGS.config, f"--config={flags.FLAGS['config'].config_filename}"
    if isinstance(given, kind):
        return given
    try:  # a missing file is reported when a field is read
        _ = given.any_field
    except OSError as error:
        raise InputError(f"{flag}: {str(error).splitlines()[-1].strip()}") from error
    except AttributeError:
        pass
    needed = f"{kind.__module__}.{kind.__name__}"
    raise InputError(f"{flag}: get_config() must return a {needed}, not a {type(given).__name__}")


def processor() -> str:
    """The CPU's model name."""
    try:  # Linux
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _parse_flags(argv: list[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    except Exception as error:  # parsing --config executes the config file, which may raise anything
        raise InputError(_describe(error, argv)) from error


def _describe(error: Exception, argv: list[str]) -> str:
    """One line about an error in a flag, or in the config file of --config, with its line number."""
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
    """Parses the flags, calls `main()` and exits with the codes listed above."""

    def guarded(argv: list[str]) -> None:
        if len(argv) > 1:
            raise InputError(f"unexpected argument {argv[1]!r}: options are flags, --name=value")
        for flag in flags.FLAGS.get_key_flags_for_module(sys.argv[0]):
            if flag.present and flag.value == "":
                raise InputError(f"--{flag.name}: is empty")
        _use_compilation_cache(flags.FLAGS.compilation_cache)
        main()

    logging.set_verbosity(logging.ERROR)  # JAX and Orbax log absent backends and the like
    try:
        app.run(guarded, flags_parser=_parse_flags)
    except InputError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
