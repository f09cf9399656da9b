import json

import pytest

from msn_jax import json_files
from msn_jax.cli import InputError


def test_what_was_written_is_read_again(tmp_path):
    values = {"text": "é \u2581 \ud800", "numbers": [1, 2.5, None]}
    (tmp_path / "a.json").write_bytes(json_files.dump(values))
    assert json_files.read(tmp_path / "a.json") == values


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{\n"a": 1,\n}', "line 3: broken JSON (Expecting property name"),
        (b"", "line 1: broken JSON (Expecting value)"),
        (b'"\xff"', "cannot be read ('utf-8' codec"),
        (b"[" * 99_999, "cannot be read (maximum recursion depth"),
        (b"1" * 5000, "cannot be read (Exceeds the limit"),
        (json.dumps([1]).encode(), "must hold a JSON object, not list"),
    ],
    ids=["comma", "empty", "not UTF-8", "deep", "digits", "list"],
)
def test_what_is_no_object_is_refused(content, said, tmp_path):
    (tmp_path / "a.json").write_bytes(content)
    for read in (lambda: json_files.read(tmp_path / "a.json"), lambda: json_files.parse(content, f"{tmp_path}/a.json")):
        with pytest.raises(InputError) as refusal:
            read()
        assert str(refusal.value).startswith(f"{tmp_path}/a.json: {said}") and "\n" not in str(refusal.value)


def test_what_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"none\.json: is missing"):
        json_files.read(tmp_path / "none.json")
    with pytest.raises(InputError, match=r"cannot be read \(\[Errno 21\] Is a directory"):
        json_files.read(tmp_path)
