"""Runs programs in this process, as `python -m MODULE` would: imports and compiled programs are shared."""

import contextlib
import io
import runpy
import sys
from pathlib import Path
from unittest import mock

import jax
from absl import flags


def run(program: str, arguments: list[str]) -> tuple[int, str]:
    """(exit code, stdout and stderr) of a module, or of a script that ends with .py, in the working directory."""
    known = set(flags.FLAGS)
    values = {name: flags.FLAGS[name].value for name in known}
    output, devices = io.StringIO(), jax.devices()[:1]  # programs for one device compile in half the time
    imported = sys.modules.pop(program, None)  # runpy warns of a module that is imported already
    with (
        mock.patch.object(sys, "argv", [program, *arguments]),
        mock.patch.object(jax, "devices", lambda *_: devices),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(output),
        jax.numpy_dtype_promotion("standard"),  # optax mixes dtypes
    ):
        try:
            execute = runpy.run_path if Path(program).suffix == ".py" else runpy.run_module
            execute(program, run_name="__main__")
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        finally:
            if imported is not None:
                sys.modules[program] = imported
            for name in set(flags.FLAGS) - known:  # those of the program; libraries that it imports define others
                if name.startswith("config") or flags.FLAGS.find_module_defining_flag(name) == program:
                    delattr(flags.FLAGS, name)
            for name, value in values.items():
                flags.FLAGS[name].value, flags.FLAGS[name].present = value, 0
    return code, output.getvalue()
