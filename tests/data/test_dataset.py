"""`dataset.load_rows`: from a user's file to packed rows, and records that the tokenizer cannot show."""

import dataclasses
import sys
from pathlib import Path

import pytest
import tiny_config
from conversations import CHAT, write_lines

from msn_jax.cli import InputError
from msn_jax.config import DataConfig
from msn_jax.data import chat, dataset
from msn_jax.data import tokenizer as tokenizer_lib

WITH_TOOL = {"messages": [*CHAT, {"role": "tool", "content": "sunny"}]}  # a tokenizer without template refuses it
BAD_LINE = {"messages": []}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    text = "def area(width, height):\n    return width * height\nWhat is 2 + 2? It is 4. Be brief.\n"
    return tokenizer_lib.train([text] * 20, 310, tmp_path_factory.mktemp("dataset") / "tokenizer.model")


@pytest.fixture(params=["with TFDS", "without TFDS"])
def configure(request, tmp_path, monkeypatch):
    """Makes the config of a file with the given records."""
    if request.param == "without TFDS":
        monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)

    def config_of(records, **fields):
        path = write_lines(tmp_path / "chat.jsonl", records)
        data = DataConfig("sft_jsonl", str(tmp_path / "data"), row_length=64, batch_size=2, path=str(path))
        return dataclasses.replace(tiny_config.get_config(), data=dataclasses.replace(data, **fields))

    return config_of


def chats(count):
    return [{"messages": [{"role": "user", "content": str(i)}, CHAT[1]]} for i in range(count)]


def test_a_record_that_cannot_be_tokenized_is_named_with_its_line(configure, tokenizer):
    for index in (0, 7, 39):  # whichever split it is in
        records = chats(40)
        records[index] = WITH_TOOL
        cfg = configure(records)
        with pytest.raises(InputError) as caught:
            dataset.load_rows(cfg, tokenizer)
        with pytest.raises(InputError) as reason:
            chat.encode_record(tokenizer, WITH_TOOL)
        assert str(caught.value) == f"{cfg.data.path}:{index + 1}: {reason.value}"


def test_skipped_records_of_both_kinds_count_together(configure, tokenizer, capfd):
    records = [BAD_LINE, *chats(38), WITH_TOOL]
    train, validation = dataset.load_rows(configure(records, on_bad_record="skip"), tokenizer)
    assert train.stats.samples + validation.stats.samples == 38
    path = configure(records).data.path
    output = capfd.readouterr()
    lines = output.err.splitlines()
    assert lines[0] == f"warning: skipped {path}:1: no assistant turn to learn"
    assert sum(line.startswith(f"warning: skipped {path}:40: ") for line in lines) == 1
    assert lines[-1] == f"warning: {path}: skipped 2 of 40 records"
    assert sum(line.startswith(f"warning: {path}: skipped ") for line in lines) == 1
    assert output.out.startswith("train: ") and "\nvalidation: " in output.out

    cfg = configure([BAD_LINE, *chats(37), WITH_TOOL], on_bad_record="skip")
    with pytest.raises(InputError, match=r"chat\.jsonl: 2 of 39 records are bad, above the 5% that"):
        dataset.load_rows(cfg, tokenizer)


def test_locations_do_not_change_the_tokens(configure, tokenizer):
    """The tokens depend only on the records."""
    cfg = configure(chats(40))
    rows = dataset.load_rows(cfg, tokenizer)
    lines = Path(cfg.data.path).read_text(encoding="utf-8")
    Path(cfg.data.path).write_text("\n\n" + lines, encoding="utf-8")
    later = dataset.load_rows(cfg, tokenizer)
    assert [part.fingerprint() for part in later] == [part.fingerprint() for part in rows]


def test_turns_kept_as_context_are_not_learned(configure, tokenizer):
    turns = [CHAT[0], {"role": "assistant", "content": "no", "weight": 0}, CHAT[0], CHAT[1]]
    train, _ = dataset.load_rows(configure([{"messages": turns}] * 2), tokenizer)
    learned = tokenizer.decode(train.tokens[train.response_mask].tolist())
    assert "Hello" in learned and "no" not in learned


def test_the_setting_for_special_tokens_reaches_the_encoder(configure, tokenizer, monkeypatch):
    encode, received = chat.encode_record, []

    def recording(tokenizer, record, parse_special_tokens=False):
        received.append(parse_special_tokens)
        assert "location" not in record
        return encode(tokenizer, record, parse_special_tokens)

    monkeypatch.setattr(chat, "encode_record", recording)
    for setting in (False, True):
        dataset.load_rows(configure(chats(3), parse_special_tokens=setting), tokenizer)
        assert received == [setting] * 3
        received.clear()


def test_a_call_is_not_learned_as_an_empty_reply(configure, tokenizer):
    """A tokenizer that cannot show the call refuses it."""
    call = {"type": "function", "function": {"name": "weather", "arguments": "{}"}}
    record = {"messages": [CHAT[0], {"role": "assistant", "content": "", "tool_calls": [call]}]}
    with pytest.raises(InputError, match=r"chat\.jsonl:[12]: .*tool_calls"):
        dataset.load_rows(configure([record] * 2), tokenizer)


def test_texts_for_the_tokenizer():
    assert dataset.record_texts({"text": "a", "path": "b"}) == ["a"]
    assert dataset.record_texts({"prompt": "a", "response": "b", "location": "c:1"}) == ["a", "b"]
    call = {"role": "assistant", "content": None, "tool_calls": []}
    assert dataset.record_texts({"messages": [*CHAT, call]}) == ["Hi", "Hello"]
