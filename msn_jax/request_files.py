"""Requests in files: JSON lines of prompts, with settings of their own where they have some.

Not part of `generate.py`: whoever imported that module would hide `msn_jax.generate`, the function.
"""

import json
from pathlib import Path

from msn_jax.cli import InputError
from msn_jax.decode import engine, requests
from msn_jax.decode.requests import Request


def read(path: str, settings: Request) -> dict[str, Request]:
    """The requests of a JSONL file by their place, FILE:LINE; `settings` hold where a line has none of its own.

    Raises:
      InputError: names the place that is wrong.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")  # str.splitlines would also cut inside texts
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--prompts={path}: cannot read it: {error}") from error
    places = {f"{path}:{number}": line for number, line in enumerate(lines, 1) if line.strip()}
    found = {place: _read_line(line, place, settings, i) for i, (place, line) in enumerate(places.items())}
    if not found:
        raise InputError(f"--prompts={path}: holds no prompt")
    return found


def _read_line(line: str, place: str, settings: Request, index: int) -> Request:
    try:
        record = json.loads(line)
    except (RecursionError, ValueError) as error:  # also nested too deeply, or a number of thousands of digits
        raise InputError(f"{place}: not JSON: {error}") from error
    forms = [form for form in ("prompt", "messages") if isinstance(record, dict) and form in record]
    if forms not in (["prompt"], ["messages"]) or not isinstance(record[forms[0]], {"prompt": str}.get(forms[0], list)):
        raise InputError(f'{place}: needs either {{"prompt": text}} or {{"messages": [{{"role", "content"}}, ...]}}')
    own = {name: record[name] for name in requests.SETTINGS if name in record}
    request = engine.as_request(record[forms[0]], settings, 0 if "seed" in own else index)
    return requests.with_settings(request, own)
