"""Requests from files: JSON lines of prompts, optionally with their own settings.

This is not part of `generate.py`, because importing that module would hide the function `msn_jax.generate`.
"""

import dataclasses
import sys
from pathlib import Path

from msn_jax import json_files
from msn_jax.cli import InputError
from msn_jax.data.conversations import MEANINGFUL_FIELDS, is_empty
from msn_jax.decode import engine
from msn_jax.decode.request import SETTING_NAMES, Request

_FORMS = ("prompt", "messages")
_USED = (*_FORMS, *SETTING_NAMES, "tools")
# Reference completions, which the records of data sets have next to the prompt. They do not change it.
_REFERENCES = frozenset(
    "output response completion text chosen rejected chosen_response rejected_response rejected_messages "
    "kto_tag".split()
)
_REMEDIES = {"system": "give a message of this role", "functions": "name it 'tools'"}  # other fields: remove it
_OTHER_NAMES = {"max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens"}  # of OpenAI's API


def read(path: str, settings: Request) -> dict[str, Request]:
    """The requests of a JSONL file by their location, FILE:LINE.

    Args:
      path: each line is {"prompt": text} or {"messages": [...], "tools": [...] (optional)}, and may have settings.
        Null counts as absent. Other fields, such as an id, are ignored, with a note on stderr, unless they would change
        the prompt in a data set for training.
      settings: the settings that a line does not set itself.

    Raises:
      InputError: names the malformed line.
    """
    try:
        content = Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise InputError(f"--prompts={path}: cannot be read: {error.strerror}") from error
    lines = {f"{path}:{number}": line for number, line in enumerate(content.split(b"\n"), 1) if line.strip()}
    if not lines:
        raise InputError(f"--prompts={path}: has no prompts; write one JSON object per line")
    records = {location: _read_line(line, location) for location, line in lines.items()}
    unused = sorted({name for record in records.values() for name in record}.difference(_USED))
    if unused:
        print(f"--prompts={path}: ignores the unknown fields {', '.join(unused)}", file=sys.stderr)
    return {location: _request(record, settings, i) for i, (location, record) in enumerate(records.items())}


def _read_line(line: bytes, location: str) -> dict:
    """The line's object, without fields that are null or empty and not used."""
    try:
        record = json_files.loads(line.decode())
    except UnicodeDecodeError as error:
        raise InputError(f"{location}: not UTF-8: save the file as UTF-8") from error
    except (RecursionError, ValueError) as error:  # also nested too deeply, or a number with thousands of digits
        raise InputError(f"{location}: not JSON: {error}") from error
    forms = [form for form in _FORMS if isinstance(record, dict) and form in record]
    if forms not in (["prompt"], ["messages"]) or not isinstance(record[forms[0]], {"prompt": str}.get(forms[0], list)):
        raise InputError(f'{location}: must be {{"prompt": text}} or {{"messages": [{{"role", "content"}}, ...]}}')
    if "prompt" in record and record.get("tools"):
        raise InputError(f"{location}: has tools with a raw text prompt; give messages instead")
    record = {name: field for name, field in record.items() if name in _USED or not is_empty(field)}
    for name in sorted(record.keys() & _OTHER_NAMES.keys()):
        raise InputError(f"{location}: unknown setting {name!r}: the limit is {_OTHER_NAMES[name]!r}")
    for name in sorted(record.keys() & (MEANINGFUL_FIELDS - _REFERENCES).difference(_USED)):
        remedy = _REMEDIES.get(name, "remove it")
        raise InputError(f"{location}: cannot use field {name!r}, which changes the prompt: {remedy}")
    return record


def _request(record: dict, settings: Request, index: int) -> Request:
    own = {name: record[name] for name in (*SETTING_NAMES, "tools") if record.get(name) is not None}
    prompt = record["prompt"] if "prompt" in record else record["messages"]
    return dataclasses.replace(engine.as_request(prompt, settings, 0 if "seed" in own else index), **own)
