"""The cache of compiled programs, in whole processes."""

import os
import subprocess
import sys
from pathlib import Path

from msn_jax import cli

ROOT = Path(__file__).parents[1]
_PROGRAM = """
import jax, jax.numpy as jnp
from msn_jax import cli

def main():
    print(jax.jit(lambda x: jnp.sort(jnp.sin(x) @ jnp.cos(x).T))(jnp.ones((8, 9))).sum())

cli._MIN_COMPILE_SECONDS = 0.0
cli.run(main)
"""


def run(directory: Path, *arguments: str, **environment: str) -> tuple[int, str, str]:
    (directory / "program.py").write_text(_PROGRAM)
    inherited = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    done = subprocess.run(
        [sys.executable, "program.py", *arguments],
        cwd=directory,
        env={**inherited, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(directory / "home"), **environment},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout, done.stderr


def files(directory: Path) -> dict[str, int]:
    """Names of the cached programs, and when each was written."""
    return {path.name: path.stat().st_mtime_ns for path in directory.rglob("*-cache")}


def test_programs_are_compiled_once_per_user(tmp_path):
    first = run(tmp_path)
    assert (first[0], first[2]) == (0, "")
    written = files(tmp_path / "home" / "msn_jax" / "compilation")
    assert written
    assert run(tmp_path) == first
    assert files(tmp_path / "home") == written


def test_the_cache_moves_and_can_be_switched_off(tmp_path):
    expected = run(tmp_path, "--compilation_cache=")
    assert run(tmp_path, JAX_COMPILATION_CACHE_DIR="") == expected
    assert not files(tmp_path)
    assert run(tmp_path, f"--compilation_cache={tmp_path / 'flag'}") == expected
    assert files(tmp_path / "flag")
    assert run(tmp_path, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "jax")) == expected
    assert files(tmp_path / "jax")
    assert not files(tmp_path / "home")


def test_a_directory_that_cannot_be_written_is_no_obstacle(tmp_path):
    (tmp_path / "file").write_text("kept")
    code, out, _ = run(tmp_path, f"--compilation_cache={tmp_path / 'file' / 'sub'}")
    assert (code, out) == run(tmp_path, "--compilation_cache=")[:2]
    assert (tmp_path / "file").read_text() == "kept"


def test_the_default_is_the_users_cache_directory():
    assert cli._CACHE.parts[-2:] == ("msn_jax", "compilation")
