"""Files of prompts: what a line may hold, and what is refused with its line."""

import json

import pytest

from msn_jax import request_files
from msn_jax.cli import InputError
from msn_jax.decode.request import SETTING_NAMES, Request

MESSAGES = [{"role": "user", "content": "a"}]


def test_prompts_are_read_unchanged(tmp_path):
    path = tmp_path / "prompts.jsonl"
    lines = ['{"prompt": "a\u2028b é"}', "", '{"messages": [{"role": "user", "content": "c"}]}']
    path.write_bytes(("\ufeff" + "\r\n".join(lines)).encode())
    assert request_files.read(str(path), Request("", seed=3)) == {
        f"{path}:1": Request("a\u2028b é", seed=3, sample=0),
        f"{path}:3": Request([{"role": "user", "content": "c"}], seed=3, sample=1),
    }


@pytest.mark.parametrize(
    "line",
    [
        '{"messages": "hello"}',
        '{"prompt": [{"role": "user", "content": "a"}]}',
        '{"prompt": "a", "messages": [{"role": "user", "content": "a"}]}',
        '{"prompt": null}',
        '{"prompt": "a", "tools": [{"name": "f"}]}',
        '["a"]',
        '{"prompt": ' + "9" * 6000 + "}",
        "[" * 100_000,
    ],
)
def test_a_malformed_line_is_named(tmp_path, line):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n' + line)
    with pytest.raises(InputError, match=r"p\.jsonl:2: (must be|has tools|not JSON)"):
        request_files.read(str(tmp_path / "p.jsonl"), Request(""))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (
            {"system": "Be kind"},
            "cannot use field 'system', which changes the prompt: give a message of this role",
        ),
        (
            {"functions": [{"name": "f"}]},
            "cannot use field 'functions', which changes the prompt: name it 'tools'",
        ),
        ({"images": ["a.png"]}, "cannot use field 'images', which changes the prompt: remove it"),
        ({"enable_thinking": False}, "cannot use field 'enable_thinking', which changes the prompt: remove it"),
        ({"max_tokens": 3}, "unknown setting 'max_tokens': the limit is 'max_new_tokens'"),
        ({"max_completion_tokens": 3}, "unknown setting 'max_completion_tokens': the limit is 'max_new_tokens'"),
    ],
)
def test_a_field_that_would_change_the_output_is_refused(tmp_path, fields, reason):
    path = tmp_path / "p.jsonl"
    for prompt in ({"prompt": "a"}, {"messages": MESSAGES}):
        path.write_text('{"prompt": "b"}\n' + json.dumps(prompt | fields))
        with pytest.raises(InputError) as refusal:
            request_files.read(str(path), Request(""))
        assert str(refusal.value) == f"{path}:2: {reason}"


def test_null_empty_and_reference_fields_are_ignored(tmp_path, capsys):
    fields = {"system": None, "functions": [], "max_tokens": None, "response": "b", "completion": "c", "text": "d"}
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "a", **fields}))
    assert list(request_files.read(str(tmp_path / "p.jsonl"), Request("")).values()) == [Request("a")]
    assert capsys.readouterr().err.endswith(": ignores the unknown fields completion, response, text\n")


def test_a_line_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "p.jsonl").write_bytes(b'{"prompt": "a"}\n\n{"prompt": "\xe9"}\n')
    with pytest.raises(InputError, match=r"p\.jsonl:3: not UTF-8: save the file as UTF-8"):
        request_files.read(str(tmp_path / "p.jsonl"), Request(""))


def test_a_line_with_a_duplicate_key_is_refused(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{"prompt": "lost", "prompt": "b"}')
    with pytest.raises(InputError, match=r"p\.jsonl:2: not JSON: key 'prompt' occurs twice in an object"):
        request_files.read(str(tmp_path / "p.jsonl"), Request(""))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ({"prompt": "a"}, Request("a", 9, seed=3, stop=("x",), sample=4)),
        ({"prompt": "a", "stop": "y"}, Request("a", 9, seed=3, stop=("y",), sample=4)),
        ({"prompt": "a", "stop": ["y", "z"], "top_k": 2}, Request("a", 9, 0.0, 2, seed=3, stop=("y", "z"), sample=4)),
        ({"prompt": "a", **dict.fromkeys((*SETTING_NAMES, "tools"))}, Request("a", 9, seed=3, stop=("x",), sample=4)),
        (
            {"messages": MESSAGES, "tools": [{"name": "f"}], "parse_special_tokens": True},
            Request(MESSAGES, 9, seed=3, stop=("x",), sample=4, parse_special_tokens=True, tools=[{"name": "f"}]),
        ),
        ({"prompt": "a", "stop": [], "temperature": 1, "top_p": 0.5}, Request("a", 9, 1, 0, 0.5, seed=3, sample=4)),
        ({"prompt": "a", "min_p": 0.1, "max_new_tokens": 2}, Request("a", 2, min_p=0.1, seed=3, stop=("x",), sample=4)),
        ({"prompt": "a", "seed": 8, "other": 1}, Request("a", 9, seed=8, stop=("x",))),  # the line's own first sample
    ],
)
def test_a_line_may_have_its_own_settings(tmp_path, capsys, line, expected):
    (tmp_path / "p.jsonl").write_text('{"prompt": "b"}\n' * 4 + json.dumps(line))
    requests = request_files.read(str(tmp_path / "p.jsonl"), Request("", 9, seed=3, stop=("x",)))
    assert requests[f"{tmp_path / 'p.jsonl'}:5"] == expected
    note = f"--prompts={tmp_path / 'p.jsonl'}: ignores the unknown fields other\n"
    assert capsys.readouterr().err == (note if "other" in line else "")
