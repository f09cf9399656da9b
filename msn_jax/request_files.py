"""Requests in files: JSON lines of prompts, with settings of their own where they have some.

Not part of `generate.py`: whoever imported that module would hide `msn_jax.generate`, the function.
"""

import json
import sys
from pathlib import Path

from msn_jax.cli import InputError
from msn_jax.decode import engine
from msn_jax.decode.request import SETTING_NAMES, Request, with_settings

_FORMS = ("prompt", "messages")


def read(path: str, settings: Request) -> dict[str, Request]:
    """The requests of a JSONL file by their place, FILE:LINE; `settings` hold where a line has none of its own. Other
    fields, such as an id, are left aside, which a line on stderr says.

    Raises:
      InputError: names the place that is wrong.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")  # str.splitlines would also cut inside texts
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--prompts={path}: cannot read it: {error}") from error
    places = {f"{path}:{number}": line for number, line in enumerate(lines, 1) if line.strip()}
    if not places:
        raise InputError(f"--prompts={path}: holds no prompt")
    records = {place: _read_line(line, place) for place, line in places.items()}
    unused = sorted({name for record in records.values() for name in record} - {*_FORMS, *SETTING_NAMES})
    if unused:
        print(f"--prompts={path}: fields without a meaning here: {', '.join(unused)}", file=sys.stderr)
    return {place: _request(record, settings, i) for i, (place, record) in enumerate(records.items())}


def _read_line(line: str, place: str) -> dict:
    try:
        record = json.loads(line)
    except (RecursionError, ValueError) as error:  # also nested too deeply, or a number of thousands of digits
        raise InputError(f"{place}: not JSON: {error}") from error
    forms = [form for form in _FORMS if isinstance(record, dict) and form in record]
    if forms not in (["prompt"], ["messages"]) or not isinstance(record[forms[0]], {"prompt": str}.get(forms[0], list)):
        raise InputError(f'{place}: needs either {{"prompt": text}} or {{"messages": [{{"role", "content"}}, ...]}}')
    return record


def _request(record: dict, settings: Request, index: int) -> Request:
    own = {name: record[name] for name in SETTING_NAMES if name in record}
    prompt = record["prompt"] if "prompt" in record else record["messages"]
    return with_settings(engine.as_request(prompt, settings, 0 if "seed" in own else index), own)
