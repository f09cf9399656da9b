"""The user's .json and .jsonl files: their records, the validation split, and what happens to bad records.

Every record keeps its location ('location': 'chats.jsonl:3', or 'chats.json: record 3'), so that whatever finds a fault
in it later, up to tokenization, can name it.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from msn_jax import json_files
from msn_jax.cli import InputError, warn_once
from msn_jax.data import conversations

HELD_OUT = 0.05  # approximate fraction of the files or records in the validation split

_MAX_BAD = 0.05  # fraction of the records that may be skipped
_MAX_NAMED = 10  # skipped records that are named


def sft_jsonl(path: str | os.PathLike, on_bad_record: str = "stop") -> dict[str, list[dict]]:
    """The records of `read`, by split.

    About 5% of the records, chosen by their content, form the validation split; of two or more records at least one.

    Returns:
      'train' and 'validation': the records in their order. 'bad': {'error', 'location'} of each record that was
      skipped, for `report_bad`.
    """
    records, bad = read(path, on_bad_record)
    return {**_split(records), "bad": bad}


def read(path: str | os.PathLike, on_bad_record: str = "stop") -> tuple[list[dict], list[dict]]:
    """Records of a .jsonl (one per line) or .json file (a list), as `conversations.normalize` gives them.

    Args:
      path: the file.
      on_bad_record: 'stop' raises at the first bad record, 'skip' leaves it out.

    Returns:
      The records in their order, each with its 'location'; and {'error', 'location'} of each record that was skipped.

    Raises:
      InputError: names the file, the line (the record in a .json file) and the fault; or more than 5% of the records
        are bad.
    """
    path = Path(path)
    records, bad, ignored = [], [], set()
    for location, text in _read_entries(path):
        try:
            record, names = conversations.normalize(_parse(text, location), location)
        except InputError as error:
            if on_bad_record == "stop":
                raise
            bad.append({"error": str(error).removeprefix(f"{location}: "), "location": location})
            continue
        records.append({**record, "location": location})
        ignored |= names
    if ignored:
        warn_once(f"{path}: fields that are not used: {', '.join(sorted(ignored))}")
    _check_bad(path, bad, len(bad) + len(records))
    if not records:
        raise InputError(f"{path}: no records: expected {conversations.FORMS}")
    return records, bad


def report_bad(path: str | os.PathLike, bad: Sequence[dict], total: int) -> None:
    """Names the first ten skipped records on stderr, and counts all of them.

    Args:
      path: the file.
      bad: {'error', 'location'} of each skipped record.
      total: number of records of the file, the skipped ones included.

    Raises:
      InputError: they are more than 5% of the records.
    """
    path = Path(path)
    _check_bad(path, bad, total)
    if bad:
        _name_bad(bad)
        warn_once(f"{path}: skipped {len(bad)} of {total} records")


def _check_bad(path: Path, bad: Sequence[dict], total: int) -> None:
    """Raises like `report_bad`, which gives the arguments, after naming the first ten."""
    if len(bad) > _MAX_BAD * total:
        _name_bad(bad)
        raise InputError(
            f"{path}: {len(bad)} of {total} records are bad, above the {_MAX_BAD:.0%} that "
            f"--config.data.on_bad_record=skip allows; the first is {bad[0]['location']}: {bad[0]['error']}"
        )


def _name_bad(bad: Sequence[dict]) -> None:
    for record in bad[:_MAX_NAMED]:
        warn_once(f"skipped {record['location']}: {record['error']}")


def read_bytes(path: Path) -> bytes:
    """The content of a .json or .jsonl file. InputError if it has another name or cannot be read."""
    if path.suffix not in (".json", ".jsonl"):
        raise InputError(f"{path}: expected a .json or .jsonl file")
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error


def hash_fraction(text: str) -> float:
    """A number in [0, 1) that depends only on the text."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()[:8], "big") / 2**64


def _split(records: list[dict]) -> dict[str, list[dict]]:
    """The splits by content: neither the order of the records nor their locations matter."""
    contents = [{name: field for name, field in record.items() if name != "location"} for record in records]
    fractions = [hash_fraction(json.dumps(content, sort_keys=True)) for content in contents]
    order = sorted(range(len(records)), key=fractions.__getitem__)
    least, most = (1, len(records) - 1) if len(records) > 1 else (0, 0)
    held_out = set(order[: min(max(sum(fraction < HELD_OUT for fraction in fractions), least), most)])
    return {
        "train": [record for i, record in enumerate(records) if i not in held_out],
        "validation": [record for i, record in enumerate(records) if i in held_out],
    }


def _read_entries(path: Path) -> Iterator[tuple[str, object]]:
    """(location, entry) of every record: the line as bytes, or in a .json file the parsed value."""
    content = read_bytes(path).removeprefix(b"\xef\xbb\xbf")
    if path.suffix == ".jsonl":
        for number, line in enumerate(content.split(b"\n"), 1):
            if line.strip():
                yield f"{path}:{number}", line
        return
    values = _parse_json(content, path, "; a file with one record per line is named .jsonl") if content.strip() else []
    if not isinstance(values, list):
        raise InputError(f"{path}: expected a list of records, not {conversations.kind(values)}")
    yield from ((f"{path}: record {number}", value) for number, value in enumerate(values, 1))


def _parse(entry: object, location: str) -> object:
    if not isinstance(entry, bytes):
        return entry
    path, line = location.rsplit(":", 1)
    return _parse_json(entry, Path(path), "; expected one record per line", int(line))


def _parse_json(content: bytes, path: Path, advice: str, first_line: int = 1) -> object:
    """The value of a file, or of its line `first_line`."""
    try:
        return json_files.loads(content.decode())
    except UnicodeDecodeError as error:
        line = first_line + content.count(b"\n", 0, error.start)
        raise InputError(f"{path}:{line}: not UTF-8: save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise InputError(f"{path}:{line}: malformed JSON: {error.msg} (column {error.colno}){advice}") from error
    except json_files.DuplicateKeyError as error:
        if path.suffix == ".json":  # the line is not known
            raise InputError(f"{path}: malformed JSON: {error}") from error
        raise InputError(f"{path}:{first_line}: malformed JSON: {error}{advice}") from error
    except (RecursionError, ValueError) as error:  # nested too deeply, or a number of thousands of digits
        raise InputError(f"{path}:{first_line}: malformed JSON: {error}{advice}") from error
