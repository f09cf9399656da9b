import json

import pytest

from msn_jax import json_files
from msn_jax.cli import InputError


def test_round_trip(tmp_path):
    values = {"text": "é \u2581 \ud800", "numbers": [1, 2.5, None]}
    (tmp_path / "a.json").write_bytes(json_files.dump(values))
    assert json_files.read(tmp_path / "a.json") == values


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{\n"a": 1,\n}', "line 3: broken JSON (Expecting property name"),
        (b"", "line 1: broken JSON (Expecting value)"),
        (b'"\xff"', "cannot be read ('utf-8' codec"),
        (b"[" * 99_999, "cannot be read (maximum recursion depth"),
        (b"1" * 5000, "cannot be read (Exceeds the limit"),
        (json.dumps([1]).encode(), "must be a JSON object, not list"),
    ],
    ids=["comma", "empty", "not UTF-8", "deep", "digits", "list"],
)
def test_malformed_content_is_refused_by_line(content, message, tmp_path):
    (tmp_path / "a.json").write_bytes(content)
    for read in (lambda: json_files.read(tmp_path / "a.json"), lambda: json_files.parse(content, f"{tmp_path}/a.json")):
        with pytest.raises(InputError) as refusal:
            read()
        assert str(refusal.value).startswith(f"{tmp_path}/a.json: {message}") and "\n" not in str(refusal.value)


def test_a_missing_or_unreadable_file_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"none\.json: is missing"):
        json_files.read(tmp_path / "none.json")
    with pytest.raises(InputError, match=r"cannot be read \(\[Errno 21\] Is a directory"):
        json_files.read(tmp_path)
