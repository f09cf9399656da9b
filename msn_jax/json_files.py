"""The JSON objects in files of Hugging Face directories, in and out."""

import json
from collections.abc import Mapping
from pathlib import Path

from msn_jax.cli import InputError


def read(path: Path) -> dict:
    """The object of a file. InputError if the file is missing or holds none."""
    try:
        return parse(path.read_bytes(), str(path))
    except FileNotFoundError as error:
        raise InputError(f"{path}: is missing: a Hugging Face directory has one") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error})") from error


def parse(content: bytes, place: str) -> dict:
    """The object that `content` is. InputError, which begins with `place`, if it is none."""
    try:
        value = json.loads(content)
    except json.JSONDecodeError as error:
        raise InputError(f"{place}: line {error.lineno}: broken JSON ({error.msg})") from error
    except (RecursionError, ValueError) as error:  # nested too deeply, a number of thousands of digits, not UTF-8
        raise InputError(f"{place}: cannot be read ({error})") from error
    if not isinstance(value, dict):
        raise InputError(f"{place}: must hold a JSON object, not {type(value).__name__}")
    return value


def dump(values: Mapping[str, object]) -> bytes:
    """The content of a file. ASCII: it may hold what UTF-8 cannot, half of a surrogate pair that was read."""
    return (json.dumps(values, indent=2) + "\n").encode("ascii")
