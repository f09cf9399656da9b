"""What the programs share: flags in, exit codes out.

0 done; 1 the work failed (with its stack trace); 2 the user's input was wrong: one line on stderr, no stack trace.
"""

import sys
from collections.abc import Callable

from absl import app, flags, logging


class InputError(Exception):
    """The user's input is wrong. The message is one line: what was found, where, and what would do."""


def _parse_flags(argv: list[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    except (flags.Error, AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        # Config files and their overrides are parsed as flags, so their mistakes arrive here under many names.
        # A mistake inside a config file comes with that file's stack trace, whose last line says it all.
        message = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
        raise InputError(message.strip().splitlines()[-1] if "Traceback" in message else message) from error


def run(main: Callable[[], None]) -> None:
    """Parses the flags, calls `main()` and exits with the project's exit codes."""

    def guarded(argv: list[str]) -> None:
        logging.set_verbosity(logging.ERROR)  # JAX and Orbax tell of backends that they did not find, and the like
        if len(argv) > 1:
            raise InputError(f"unexpected argument {argv[1]!r}: every option is a flag, --name=value")
        main()

    try:
        app.run(guarded, flags_parser=_parse_flags)
    except InputError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
