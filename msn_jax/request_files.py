"""Requests from files: JSON lines of prompts, optionally with their own settings.

This is not part of `generate.py`, because importing that module would hide the function `msn_jax.generate`.
"""

import json
import sys
from pathlib import Path

from msn_jax.cli import InputError
from msn_jax.decode import engine
from msn_jax.decode.request import SETTING_NAMES, Request, with_settings

_FORMS = ("prompt", "messages")


def read(path: str, settings: Request) -> dict[str, Request]:
    """The requests of a JSONL file by their location, FILE:LINE.

    Args:
      path: each line is {"prompt": text} or {"messages": [...], "tools": [...] (optional)}, and may have settings.
        Other fields, such as an id, are ignored, with a note on stderr.
      settings: the settings that a line does not set itself.

    Raises:
      InputError: names the malformed line.
    """
    try:
        # str.splitlines would also split at U+2028 and the like, inside of strings.
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--prompts={path}: cannot be read: {error}") from error
    locations = {f"{path}:{number}": line for number, line in enumerate(lines, 1) if line.strip()}
    if not locations:
        raise InputError(f"--prompts={path}: has no prompts; write one JSON object per line")
    records = {location: _read_line(line, location) for location, line in locations.items()}
    unused = sorted({name for record in records.values() for name in record} - {*_FORMS, *SETTING_NAMES, "tools"})
    if unused:
        print(f"--prompts={path}: ignores the unknown fields {', '.join(unused)}", file=sys.stderr)
    return {location: _request(record, settings, i) for i, (location, record) in enumerate(records.items())}


def _read_line(line: str, location: str) -> dict:
    try:
        record = json.loads(line)
    except (RecursionError, ValueError) as error:  # also nested too deeply, or a number with thousands of digits
        raise InputError(f"{location}: not JSON: {error}") from error
    forms = [form for form in _FORMS if isinstance(record, dict) and form in record]
    if forms not in (["prompt"], ["messages"]) or not isinstance(record[forms[0]], {"prompt": str}.get(forms[0], list)):
        raise InputError(f'{location}: must be {{"prompt": text}} or {{"messages": [{{"role", "content"}}, ...]}}')
    if "prompt" in record and record.get("tools"):
        raise InputError(f"{location}: has tools with a raw text prompt; give messages instead")
    return record


def _request(record: dict, settings: Request, index: int) -> Request:
    own = {name: record[name] for name in (*SETTING_NAMES, "tools") if name in record}
    prompt = record["prompt"] if "prompt" in record else record["messages"]
    return with_settings(engine.as_request(prompt, settings, 0 if "seed" in own else index), own)
