"""Questions of the suites, from data files that are checked line by line."""

import dataclasses
import gzip
import hashlib
import json
import types
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from msn_jax import json_files
from msn_jax.cli import InputError

Fields = Mapping[str, type | types.GenericAlias]  # of a record: str, int, list, or list[str] for one or more texts


@dataclasses.dataclass(frozen=True)
class Question:
    """One question of a suite."""

    id: int | str  # unique within the suite
    group: str  # subtask, category or subject; the same for all where a suite has no groups
    prompt: str | tuple[str, ...]  # raw text, or the user's turns of a conversation
    reference: dict  # what the score needs
    location: str  # FILE:LINE, for error messages


def read_records(path: Path, fields: Fields, name: str) -> list[tuple[str, dict]]:
    """(location, record) of every record of a file.

    Args:
      path: a Parquet file (`.parquet`), a JSON list, or JSON lines; the latter two may be compressed (`.gz`).
      fields: the required fields of each record; it may have others.
      name: what the file should be, for error messages.

    Raises:
      InputError: the file cannot be read, is empty, or has a record without these fields.
    """
    if path.suffix == ".parquet":
        records = _read_parquet(path, name)
    else:
        text = read_text(path, name)
        records = _parse_list(text, path, name) if text.lstrip().startswith("[") else _parse_lines(text, path)
    if not records:
        raise InputError(f"{path}: is empty: expected {name}")
    for location, record in records:
        check_fields(record, fields, location, name)
    return records


def _parse_lines(text: str, path: Path) -> list[tuple[str, dict]]:
    lines = [(f"{path}:{number}", line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    return [(location, json_files.parse(line.encode(), location)) for location, line in lines]


def _parse_list(text: str, path: Path, name: str) -> list[tuple[str, dict]]:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}: broken JSON ({error.msg}): expected {name}") from error
    except (RecursionError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}): expected {name}") from error
    records = [(f"{path}: item {number}", value) for number, value in enumerate(values, 1)]
    for location, value in records:
        if not isinstance(value, dict):
            raise InputError(f"{location}: must be a JSON object, not {type(value).__name__}: expected {name}")
    return records


def _read_parquet(path: Path, name: str) -> list[tuple[str, dict]]:
    import pyarrow  # here, because it takes a while
    from pyarrow import parquet

    try:
        values = parquet.ParquetFile(path).read().to_pylist()
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a Parquet file, or damaged: expected {name}") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}): expected {name}") from error
    return [(f"{path}: row {number}", value) for number, value in enumerate(values, 1)]


def read_text(path: Path, name: str) -> str:
    """The text of a file, which may be compressed (`.gz`). InputError if it cannot be read; arguments as above."""
    try:
        content = path.read_bytes()
        return (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8: expected {name}") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path}: not a gzip file, or damaged: expected {name}") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}): expected {name}") from error


def check_fields(record: Mapping[str, object], fields: Fields, location: str, name: str) -> None:
    """InputError if the record lacks one of the fields, or if one has another type. Arguments as above."""
    for field, expected in fields.items():
        if field not in record:
            raise InputError(f"{location}: has no field {field!r}: expected {name}")
        if not _is(record[field], expected):
            kinds = {str: "a text", int: "an integer", list: "a list"}
            kind = "a list of texts" if expected == list[str] else kinds[expected]
            raise InputError(f"{location}: field {field!r} must be {kind}: expected {name}")


def _is(value: object, expected: type | types.GenericAlias) -> bool:
    if expected == list[str]:
        return isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in value)
    return isinstance(value, expected) and not isinstance(value, bool)


def check_unique(questions: Sequence[Question]) -> None:
    """InputError if two questions have the same id."""
    seen: dict[int | str, str] = {}
    for question in questions:
        if question.id in seen:
            raise InputError(f"{question.location}: has the id {question.id!r} of {seen[question.id]}")
        seen[question.id] = question.location


def first_of_each_group(questions: Sequence[Question], limit: int | None) -> list[Question]:
    """The first `limit` questions of every group, in their order; all of them if it is None."""
    counts: dict[str, int] = {}
    selected = []
    for question in questions:
        counts[question.group] = counts.get(question.group, 0) + 1
        if limit is None or counts[question.group] <= limit:
            selected.append(question)
    return selected


def fingerprint(questions: Sequence[Question]) -> str:
    """SHA-256 of all questions, wherever their files are."""
    described = [dataclasses.astuple(question)[:-1] for question in questions]
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
