"""Directories that appear whole or not at all: models that programs write."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental import multihost_utils

from msn_jax.cli import InputError, cannot_make, check_directory


def check_new(path: str | Path, name: str) -> None:
    """Refuses a `path` that `whole` cannot make. Messages refer to the path as `name`."""
    path = _resolve(path, name)
    if not path.name:
        raise InputError(f"{name}: is the root of the file system: name a directory in it")
    check_directory(path, name)
    check_directory(_partial(path), name)  # is made first, and has a longer name
    if path.exists() and any(path.iterdir()):
        raise InputError(f"{name}: exists and is not an empty directory: name a new one")


@contextlib.contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """Yields a temporary directory, which is renamed to `path` on success and removed on an exception.

    Every process of a pod enters; process 0 makes, renames and removes the directory.

    Raises:
      InputError: `path` exists and is not an empty directory, or cannot be made.
    """
    check_new(path, str(path))
    path = _resolve(path, str(path))  # a rename does not follow links
    partial = _partial(path)
    first = jax.process_index() == 0
    try:
        if first:
            shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed
            try:
                partial.mkdir(parents=True)
            except OSError as error:
                raise cannot_make(str(path), error) from error
        multihost_utils.sync_global_devices("whole directory: made")
        yield partial
        multihost_utils.sync_global_devices("whole directory: filled")
        if first:
            os.replace(partial, path)
    except BaseException:
        if first:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    multihost_utils.sync_global_devices("whole directory: renamed")


def _resolve(path: str | Path, name: str) -> Path:
    """The path without links. InputError for a loop of links."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        pass  # `check_directory` names the parent
    except OSError as error:
        raise cannot_make(name, error) from error
    return Path(path).resolve()


def _partial(path: Path) -> Path:
    """In the same parent, so that a rename suffices; the name is our own, because a leftover directory is removed."""
    return path.with_name(f".{path.name}.msn_jax-partial")
