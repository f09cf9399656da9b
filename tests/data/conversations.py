"""Conversations for the tests, and files of them."""

import json

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
GOOD = {"prompt": "a", "response": "b"}


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path
