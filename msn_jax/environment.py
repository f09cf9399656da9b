"""What a measurement depends on besides the code: hardware, versions, commit and command."""

import datetime
import os
import platform
import subprocess
import sys
from pathlib import Path

import jax
import jaxlib

from msn_jax.cli import processor

_ROOT = Path(__file__).parents[1]


def environment(**versions: str) -> dict:
    """Hardware, versions, commit and command, recorded in every report. `versions` adds versions of other packages."""
    own_versions = {"python": platform.python_version(), "jax": jax.__version__, "jaxlib": jaxlib.__version__}
    return {
        "hardware": hardware(),
        "load_average": os.getloadavg()[0],  # over the last minute, in processes
        "versions": own_versions | versions,
        "commit": _commit(),
        "command": " ".join(["python -m", *_module_and_flags()]),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }


def hardware() -> str:
    """Devices and processor."""
    device, cores = jax.devices()[0], len(os.sched_getaffinity(0))
    return f"{jax.device_count()} x {device.device_kind}, {cores} CPU cores, {processor()}"


def _commit() -> str | None:
    """The commit of this checkout, followed by '+' if tracked files differ from it; None outside a checkout."""
    command = ["git", "-C", str(_ROOT), "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _module_and_flags() -> list[str]:
    path = Path(sys.argv[0]).resolve()
    module = ".".join(path.relative_to(_ROOT).with_suffix("").parts) if path.is_relative_to(_ROOT) else path.name
    return [module, *sys.argv[1:]]
