"""`corpora.sft_jsonl`: the forms of conversations, what is held out, and refusals."""

import json

import pytest
from conversations import CHAT, write_lines

from msn_jax.cli import InputError
from msn_jax.data import corpora


def both(records):
    return records["train"] + records["validation"]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"prompt": "a", "response": "b", "id": 3}, {"prompt": "a", "response": "b"}),
        ({"text": "a", "meta": {"source": "b"}}, {"text": "a"}),
        ({"messages": CHAT}, {"messages": CHAT}),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "H"}, {"value": "i"}]}, CHAT[1]]},
            {"messages": CHAT},
        ),
        (
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
            {"messages": CHAT},
        ),
        (
            {
                "system": "Be kind",
                "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}],
            },
            {"messages": [{"role": "system", "content": "Be kind"}, *CHAT]},
        ),
        ({"instruction": "Hi", "input": "", "output": "Hello"}, {"messages": CHAT}),
        (
            {"instruction": "Add", "input": "2, 2", "output": "4"},
            {"messages": [{"role": "user", "content": "Add\n2, 2"}, {"role": "assistant", "content": "4"}]},
        ),
    ],
)
def test_forms(record, expected, tmp_path):
    jsonl = write_lines(tmp_path / "chat.jsonl", [record])
    plain = tmp_path / "chat.json"
    plain.write_text(json.dumps([record], indent=2), encoding="utf-8")
    assert corpora.sft_jsonl(jsonl) == corpora.sft_jsonl(plain) == {"train": [expected], "validation": []}


def test_forms_may_be_mixed_and_lines_empty(tmp_path):
    path = tmp_path / "chat.jsonl"
    path.write_text('\ufeff{"prompt": "a", "response": "b"}\r\n\n{"instruction": "c", "output": "d"}', encoding="utf-8")
    assert len(both(corpora.sft_jsonl(path))) == 2


def test_some_conversations_are_held_out(tmp_path):
    for count in (2, 3, 400):
        rows = [{"prompt": str(i), "response": "x"} for i in range(count)]
        records = corpora.sft_jsonl(write_lines(tmp_path / "chat.jsonl", rows))
        assert sorted(both(records), key=lambda r: int(r["prompt"])) == rows
        assert 1 <= len(records["validation"]) <= max(1, count // 10)
    for i in range(20):
        rows_of_two = [{"prompt": f"{i}", "response": "x"}, {"prompt": f"{i}", "response": "y"}]
        records = corpora.sft_jsonl(write_lines(tmp_path / "two.jsonl", rows_of_two))
        assert len(records["train"]) == len(records["validation"]) == 1


def test_held_out_conversations_do_not_depend_on_the_order(tmp_path):
    rows = [{"prompt": str(i), "response": "x"} for i in range(100)]
    records = corpora.sft_jsonl(write_lines(tmp_path / "chat.jsonl", rows))
    shuffled = corpora.sft_jsonl(write_lines(tmp_path / "chat.jsonl", rows[::-1]))
    assert {r["prompt"] for r in shuffled["validation"]} == {r["prompt"] for r in records["validation"]}


GOOD = '{"prompt": "a", "response": "b"}'


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "a.jsonl",
            GOOD + '\n{"prompt": ',
            "a.jsonl:2: malformed JSON: Expecting value (column 12); expected one record per line",
        ),
        ("a.jsonl", GOOD + "\n\n[1]", "a.jsonl:3: expected an object, found a list"),
        (
            "a.jsonl",
            '{"question": "a", "answer": "b"}',
            "a.jsonl:1: unknown form (keys: answer, question): expected messages, conversations, "
            "instruction and output, prompt and response, or text",
        ),
        (
            "a.jsonl",
            '{"messages": [{"role": "tool", "content": "x"}]}',
            "a.jsonl:1: unknown role 'tool': known roles are system, user, assistant",
        ),
        (
            "a.jsonl",
            '{"conversations": [{"from": "human", "value": "x"}, {"from": "observation", "value": "x"}]}',
            "a.jsonl:1: unknown role 'observation': known roles are system, user, assistant",
        ),
        ("a.jsonl", '{"messages": [["user", "x"]]}', "a.jsonl:1: turn 1: expected an object, found a list"),
        ("a.jsonl", '{"messages": "x"}', "a.jsonl:1: expected a list of turns, found a string"),
        (
            "a.jsonl",
            '{"messages": [{"role": "user", "content": "x"}]}',
            "a.jsonl:1: no assistant turn: there is nothing to learn",
        ),
        (
            "a.jsonl",
            '{"messages": [{"role": "assistant", "content": null}]}',
            "a.jsonl:1: turn 1: 'content' is not text",
        ),
        ("a.jsonl", '{"prompt": 1, "response": "b"}', "a.jsonl:1: 'prompt' is not text"),
        (
            "a.jsonl",
            '{"instruction": "a", "output": "b", "history": [["c", "d"]]}',
            "a.jsonl:1: 'history' is not read: write the earlier turns as messages",
        ),
        ("a.jsonl", "\n", "a.jsonl: no records: expected Alpaca, messages, conversations, prompt/response or text"),
        ("a.json", "", "a.json: no records: expected Alpaca, messages, conversations, prompt/response or text"),
        ("a.json", "[]", "a.json: no records: expected Alpaca, messages, conversations, prompt/response or text"),
        ("a.json", GOOD, "a.json: expected a list of records, found an object"),
        ("a.json", f"[{GOOD}, 3]", "a.json: record 2: expected an object, found a number"),
        (
            "a.json",
            f"[\n{GOOD}\n{GOOD}]",
            "a.json:3: malformed JSON: Expecting ',' delimiter (column 1); "
            "a file with one record per line is named .jsonl",
        ),
        ("a.csv", "prompt,response", "a.csv: expected a .json or .jsonl file"),
        ("missing.jsonl", None, "missing.jsonl: no such file"),
    ],
)
def test_bad_conversations(name, text, message, tmp_path):
    path = tmp_path / name
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError) as caught:
        corpora.sft_jsonl(path)
    assert str(caught.value) == f"{tmp_path}/{message}"


def test_a_file_that_is_not_utf8(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD.encode() + b'\n{"prompt": "\xe9", "response": ""}\n')
    with pytest.raises(InputError) as caught:
        corpora.sft_jsonl(path)
    assert str(caught.value) == f"{path}:2: not UTF-8: save the file as UTF-8"
