"""The samples of an evaluation: JSON lines behind a header that names the settings.

Each sample is appended as soon as it is finished, so a run that is killed loses none, and the same command continues
after the last one. The header holds everything that the samples depend on. It has no limit on the number of questions:
a run with a higher one continues, too.
"""

import json
from pathlib import Path

from msn_jax.cli import InputError

Key = tuple[int | str, ...]


class SampleLog:
    """The samples in a file, by key."""

    def __init__(self, path: Path, header: dict, key: tuple[str, ...]):
        """Reads the samples that are there. An incomplete last line, from a killed run, is removed.

        Args:
          path: the file, made if it does not exist.
          header: JSON values; the same for every run that may continue another one.
          key: names of the fields that identify a sample.

        Raises:
          InputError: the file has another header, or a line that is not a sample.
        """
        self.path, self.header, self.key = path, header, key
        self._samples: dict[Key, dict] = {}
        try:
            content = path.read_bytes() if path.exists() else b""
            complete = content[: content.rfind(b"\n") + 1]
            first, *lines = complete.decode("utf-8", errors="replace").split("\n")[:-1] or [""]
            if first:
                self._check_header(first, json.loads(json.dumps(header)))
                for number, line in enumerate(lines, 2):
                    self._read(line, f"{path}:{number}")
            with path.open("r+b" if first else "wb") as file:
                file.truncate(len(complete) if first else 0)
                if not first:
                    file.write(json.dumps(header).encode() + b"\n")
        except OSError as error:
            raise InputError(
                f"{path}: cannot be read and written ({error.strerror}): choose another --output"
            ) from error

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
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(sample) + "\n")
        self._samples[self.key_of(sample)] = sample

    def key_of(self, sample: dict) -> Key:
        """The values that identify a sample."""
        return tuple(sample[name] for name in self.key)

    def _check_header(self, line: str, header: dict) -> None:
        try:
            found = json.loads(line)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise InputError(f"{self.path}:1: not the log of an evaluation: choose another --output")
        different = [name for name in header | found if found.get(name) != header.get(name)]
        if different:
            raise InputError(
                f"{self.path}: has samples of another evaluation (different: {', '.join(different)}): choose another "
                "--output"
            )

    def _read(self, line: str, location: str) -> None:
        try:
            sample = json.loads(line)
            key = self.key_of(sample)
            is_new = key not in self._samples
        except (ValueError, TypeError, KeyError, RecursionError):
            is_new = False
        if not is_new:
            raise InputError(f"{location}: not a sample, or a second one of a question; delete the line, or the file")
        self._samples[key] = sample
