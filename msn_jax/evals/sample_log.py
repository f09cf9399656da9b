"""The samples of an evaluation: JSON lines behind a header that names the settings.

Each sample is appended as soon as it is finished, so a run that is killed loses none, and the same command continues
after the last one. The header holds everything that the samples depend on. It has no limit on the number of questions:
a run with a higher one continues, too. One process at a time writes to a log.
"""

import contextlib
import errno
import fcntl
import json
from collections.abc import Iterable
from pathlib import Path
from typing import IO

from msn_jax.cli import InputError

Key = tuple[int | str, ...]


class SampleLog(contextlib.AbstractContextManager):
    """The samples in a file, by key. The file is locked until the log is closed, as a context manager does."""

    def __init__(self, path: Path, header: dict, key: tuple[str, ...]):
        """Reads the samples that are there. An incomplete last line, from a killed run, is removed.

        Args:
          path: the file, made if it does not exist.
          header: JSON values; the same for every run that may continue another one.
          key: names of the fields that identify a sample.

        Raises:
          InputError: the file is no log, has another header, a line that is not a sample, or is in use.
        """
        self.path, self.header, self.key = path, header, key
        with contextlib.ExitStack() as stack:
            try:
                self._file = stack.enter_context(path.open("a+b"))
                _lock(self._file, path)
                self._file.seek(0)
                self._samples, length = self._read(path, self._file.read())
                self._file.truncate(length)
                if not length:
                    self._write(header)
            except OSError as error:
                raise InputError(
                    f"{path}: cannot be read and written ({error.strerror}): choose another --output"
                ) from error
            stack.pop_all()

    def __exit__(self, *_: object) -> None:
        """Closes the file, which another process may use then."""
        self._file.close()

    def merge(self, paths: Iterable[Path]) -> None:
        """Adds the samples of other logs of the same evaluation, as far as this one lacks them.

        Args:
          paths: the logs, which may be in use; an incomplete last line is left alone.

        Raises:
          InputError: a log cannot be read, has another header, or has a line that is not a sample.
        """
        for path in paths:
            try:
                samples, _ = self._read(path, path.read_bytes())
            except OSError as error:
                raise InputError(f"{path}: cannot be read ({error.strerror}): remove it") from error
            for key, sample in samples.items():
                if key not in self:
                    self.append(sample)

    def __contains__(self, key: Key) -> bool:
        """Whether the sample is finished."""
        return key in self._samples

    def __getitem__(self, key: Key) -> dict:
        """The fields of a finished sample."""
        return self._samples[key]

    def append(self, sample: dict) -> None:
        """Adds a finished sample, which must be a new one."""
        if self.key_of(sample) in self._samples:
            raise ValueError(f"{self.path}: a second sample of {self.key_of(sample)}")
        self._write(sample)
        self._samples[self.key_of(sample)] = sample

    def key_of(self, sample: dict) -> Key:
        """The values that identify a sample."""
        return tuple(sample[name] for name in self.key)

    def _write(self, values: dict) -> None:
        self._file.write(_line(values))
        self._file.flush()

    def _read(self, path: Path, content: bytes) -> tuple[dict[Key, dict], int]:
        """The samples in the complete lines of a log, by key, and how many bytes these lines have."""
        samples: dict[Key, dict] = {}
        if _line(self.header).startswith(content):  # empty, or left by a run that was killed while it wrote the header
            return samples, 0
        complete = content[: content.rfind(b"\n") + 1]
        first, *lines = complete.decode("utf-8", errors="replace").split("\n")[:-1] or [""]
        _check_header(first, json.loads(json.dumps(self.header)), path)
        for number, line in enumerate(lines, 2):
            try:
                sample = json.loads(line)
                key = self.key_of(sample)
                is_new = key not in samples
            except (ValueError, TypeError, KeyError, RecursionError):
                is_new = False
            if not is_new:
                raise InputError(
                    f"{path}:{number}: not a sample, or a second one of a question; delete the line, or the file"
                )
            samples[key] = sample
        return samples, len(complete)


def _line(values: dict) -> bytes:
    return json.dumps(values).encode() + b"\n"


def _lock(file: IO[bytes], path: Path) -> None:
    """Locks the file until it is closed or the process ends. A file system that has no locks does without."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InputError(
            f"{path}: another evaluation is writing to it: wait for it, or choose another --output"
        ) from error
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
            raise


def _check_header(line: str, header: dict, path: Path) -> None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise InputError(f"{path}:1: not the log of an evaluation: choose another --output")
    different = [name for name in header | found if found.get(name) != header.get(name)]
    if different:
        raise InputError(
            f"{path}: has samples of another evaluation (different: {', '.join(different)}): choose another --output"
        )
