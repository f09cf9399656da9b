"""`record_files.sft_jsonl`: files, the validation split, and bad records."""

import json

import pytest
from conversations import CHAT, GOOD, write_lines

from msn_jax.cli import InputError
from msn_jax.data.record_files import report_bad, sft_jsonl


def both(records):
    return records["train"] + records["validation"]


def without_locations(records):
    return [{name: field for name, field in record.items() if name != "location"} for record in records]


def test_lines_and_lists_give_the_same_records_with_their_locations(tmp_path):
    rows = [{"messages": CHAT}, GOOD, {"text": "c"}]
    jsonl = write_lines(tmp_path / "chat.jsonl", rows)
    plain = tmp_path / "chat.json"
    plain.write_text(json.dumps(rows, indent=2), encoding="utf-8")
    for path, location in ((jsonl, f"{jsonl}:%d"), (plain, f"{plain}: record %d")):
        records = sft_jsonl(path)
        assert records["bad"] == []
        assert {record.pop("location") for record in both(records)} == {location % i for i in (1, 2, 3)}
    assert sorted(both(records), key=str) == sorted(rows, key=str)


def test_forms_may_be_mixed_and_lines_empty(tmp_path):
    path = tmp_path / "chat.jsonl"
    path.write_text('\ufeff{"prompt": "a", "response": "b"}\r\n\n{"instruction": "c", "output": "d"}', encoding="utf-8")
    assert {record["location"] for record in both(sft_jsonl(path))} == {f"{path}:1", f"{path}:3"}


def test_some_records_are_held_out(tmp_path):
    for count in (2, 3, 400):
        rows = [{"prompt": str(i), "response": "x"} for i in range(count)]
        records = sft_jsonl(write_lines(tmp_path / "chat.jsonl", rows))
        assert sorted(without_locations(both(records)), key=lambda record: int(record["prompt"])) == rows
        assert 1 <= len(records["validation"]) <= max(1, count // 10)
    for i in range(20):
        rows_of_two = [{"prompt": f"{i}", "response": "x"}, {"prompt": f"{i}", "response": "y"}]
        records = sft_jsonl(write_lines(tmp_path / "two.jsonl", rows_of_two))
        assert len(records["train"]) == len(records["validation"]) == 1
    records = sft_jsonl(write_lines(tmp_path / "one.jsonl", [GOOD]))
    assert (len(records["train"]), len(records["validation"])) == (1, 0)


def test_held_out_records_do_not_depend_on_their_order(tmp_path):
    rows = [{"prompt": str(i), "response": "x"} for i in range(100)]
    records = sft_jsonl(write_lines(tmp_path / "chat.jsonl", rows))
    reversed_records = sft_jsonl(write_lines(tmp_path / "chat.jsonl", rows[::-1]))
    prompts, reversed_prompts = ({r["prompt"] for r in some["validation"]} for some in (records, reversed_records))
    assert prompts == reversed_prompts


def test_ignored_fields_are_named_once_per_file(tmp_path, capfd):
    path = write_lines(tmp_path / "a.jsonl", [GOOD | {"id": i, "source": "x"} for i in range(3)])
    sft_jsonl(path)
    sft_jsonl(path)
    assert capfd.readouterr().err == f"warning: {path}: fields that are not used: id, source\n"


# --- Bad records

LINE = json.dumps(GOOD)
NO_RECORDS = (
    "no records: expected messages, conversations, instruction and output (or response), prompt and response, or text"
)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "a.jsonl",
            LINE + '\n{"prompt": ',
            "a.jsonl:2: malformed JSON: Expecting value (column 12); expected one record per line",
        ),
        ("a.jsonl", LINE + "\n\n[1]", "a.jsonl:3: expected an object, not a list"),
        ("a.jsonl", LINE + '\n{"messages": "x"}', "a.jsonl:2: expected a list of turns, not a string"),
        ("a.jsonl", "\n", f"a.jsonl: {NO_RECORDS}"),
        ("a.json", "", f"a.json: {NO_RECORDS}"),
        ("a.json", "[]", f"a.json: {NO_RECORDS}"),
        ("a.json", LINE, "a.json: expected a list of records, not an object"),
        ("a.json", f"[{LINE}, 3]", "a.json: record 2: expected an object, not a number"),
        (
            "a.json",
            f"[\n{LINE}\n{LINE}]",
            "a.json:3: malformed JSON: Expecting ',' delimiter (column 1); "
            "a file with one record per line is named .jsonl",
        ),
        (
            "a.jsonl",
            LINE + '\n{"text": "lost", "text": "b"}',
            "a.jsonl:2: malformed JSON: key 'text' occurs twice in an object; expected one record per line",
        ),
        (
            "a.json",
            '[{"messages": [{"role": "user", "content": "lost", "content": "b"}]}]',
            "a.json: malformed JSON: key 'content' occurs twice in an object",
        ),
        ("a.csv", "prompt,response", "a.csv: expected a .json or .jsonl file"),
        ("missing.jsonl", None, "missing.jsonl: no such file"),
    ],
)
def test_a_bad_file_or_record_is_named(name, text, message, tmp_path):
    path = tmp_path / name
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError) as caught:
        sft_jsonl(path)
    assert str(caught.value) == f"{tmp_path}/{message}"


def test_a_file_that_is_not_utf8(tmp_path):
    for name, opening in (("a.jsonl", b""), ("a.json", b"[")):
        path = tmp_path / name
        path.write_bytes(opening + LINE.encode() + b'\n{"prompt": "\xe9", "response": ""}\n')
        with pytest.raises(InputError) as caught:
            sft_jsonl(path)
        assert str(caught.value) == f"{path}:2: not UTF-8: save the file as UTF-8"


BAD_LINES = {
    b'{"prompt": ': "malformed JSON: Expecting value (column 12); expected one record per line",
    b'{"prompt": "\xe9", "response": ""}': "not UTF-8: save the file as UTF-8",
    b'{"prompt": "a", "response": "\\ud800"}': "\\ud800 is half of a surrogate pair, not a character: repair the text",
    b'{"messages": []}': "no assistant turn to learn",
    b'{"messages": [{"role": "assistant"}]}': "turn 1: 'content' is not text",
    b"3": "expected an object, not a number",
}


def test_bad_records_can_be_skipped(tmp_path, capfd):
    path = tmp_path / "a.jsonl"
    good = [json.dumps({"prompt": str(i), "response": "x"}).encode() for i in range(200)]
    path.write_bytes(b"\n".join([*BAD_LINES, *good]))
    records = sft_jsonl(path, "skip")
    assert len(both(records)) == 200
    expected = [(f"{path}:{i}", error) for i, error in enumerate(BAD_LINES.values(), 1)]
    assert [(record["location"], record["error"]) for record in records["bad"]] == expected
    assert capfd.readouterr().err == ""  # the caller reports them, together with those that it skips itself
    report_bad(path, records["bad"], 206)
    named = [f"warning: skipped {location}: {error}" for location, error in expected]
    assert capfd.readouterr().err.splitlines() == [*named, f"warning: {path}: skipped 6 of 206 records"]
    path.write_bytes(b"\n".join(good))
    kept = sft_jsonl(path, "stop")
    assert without_locations(kept["validation"]) == without_locations(records["validation"])


def test_only_the_first_ten_skipped_records_are_named(tmp_path, capfd):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([3] * 12 + [GOOD] * 400), encoding="utf-8")
    bad = sft_jsonl(path, "skip")["bad"]
    assert len(bad) == 12
    report_bad(path, bad, 412)
    lines = capfd.readouterr().err.splitlines()
    assert lines[0] == f"warning: skipped {path}: record 1: expected an object, not a number"
    assert len(lines) == 11 and lines[-1] == f"warning: {path}: skipped 12 of 412 records"


def test_more_than_five_percent_bad_records_stop_the_run(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [GOOD] * 95 + [3] * 5)
    assert len(sft_jsonl(path, "skip")["bad"]) == 5
    write_lines(path, [GOOD] * 94 + [3] * 5)
    with pytest.raises(InputError) as caught:
        sft_jsonl(path, "skip")
    assert str(caught.value) == (
        f"{path}: 5 of 99 records are bad, above the 5% that --config.data.on_bad_record=skip allows; "
        f"the first is {path}:95: expected an object, not a number"
    )
