"""Reads and writes the JSON objects of Hugging Face directories, and parses the JSON of users' data files."""

import json
from collections.abc import Mapping
from pathlib import Path

from msn_jax.cli import InputError


def read(path: Path) -> dict:
    """The JSON object in a file. InputError if the file is missing or is not a JSON object."""
    try:
        return parse(path.read_bytes(), str(path))
    except FileNotFoundError as error:
        raise InputError(f"{path}: is missing: a Hugging Face directory has one") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error})") from error


def parse(content: bytes, location: str) -> dict:
    """Parses a JSON object. An InputError about malformed content begins with `location`, usually the file's path."""
    try:
        value = json.loads(content)
    except json.JSONDecodeError as error:
        raise InputError(f"{location}: line {error.lineno}: broken JSON ({error.msg})") from error
    except (RecursionError, ValueError) as error:  # nested too deeply, a number of thousands of digits, not UTF-8
        raise InputError(f"{location}: cannot be read ({error})") from error
    if not isinstance(value, dict):
        raise InputError(f"{location}: must be a JSON object, not {type(value).__name__}")
    return value


class DuplicateKeyError(ValueError):
    """An object has a key twice."""


def loads(text: str) -> object:
    """`json.loads`, but raises DuplicateKeyError where it would keep only the last value of a key."""
    return json.loads(text, object_pairs_hook=_unique)


def _unique(pairs: list[tuple[str, object]]) -> dict:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise DuplicateKeyError(f"key {next(n for n in names if names.count(n) > 1)!r} occurs twice in an object")
    return values


def dump(values: Mapping[str, object]) -> bytes:
    """Serialises a JSON object. The result is ASCII, because a string may hold a lone surrogate, which UTF-8 cannot
    encode.
    """
    return (json.dumps(values, indent=2) + "\n").encode("ascii")
