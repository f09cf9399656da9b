"""SentencePiece models that other files in their directory describe."""

import chat_examples
import pytest
import sentencepiece_models
from hypothesis import given, settings
from tokenizer_files import TEXT, write

from msn_jax.cli import InputError
from msn_jax.data import chat
from msn_jax.data import tokenizer as tokenizer_lib


@pytest.fixture(scope="module")
def sentencepiece_model():
    return sentencepiece_models.train()


@pytest.fixture
def load_model(tmp_path, sentencepiece_model):
    def load(tokenizer_config=None, **files):
        write(tmp_path, tokenizer_config=tokenizer_config, **files)
        (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model)
        return tokenizer_lib.load(tmp_path)

    return load


def test_a_model_alone(load_model, tmp_path):
    tokenizer = load_model()
    assert (tokenizer.start_ids, tokenizer.stop_ids, tokenizer.template) == ((1,), (2,), None)
    assert 2 not in tokenizer.encode("a</s>") and tokenizer.decode(tokenizer.encode("a</s>")) == "a</s>"
    assert tokenizer_lib.load(tmp_path / "tokenizer.model").encode("a") == tokenizer.encode("a")
    assert load_model(generation_config={"eos_token_id": [2, 9]}).stop_ids == (2, 9)


def test_special_tokens_and_spaces_after_them(load_model):
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    added = {"320": {"content": "[INST]", "special": True}, "321": {"content": "<x>", "lstrip": True}}
    tokenizer = load_model({**names, "legacy": False, "added_tokens_decoder": added})
    hello, world = (tokenizer.processor.encode(text) for text in ("hello", "world"))
    plain = tokenizer.continuation.encode
    assert tokenizer.vocab_size == 322
    assert tokenizer.encode("hello[INST]world</s>") == [*hello, 320, *plain("world"), 2]
    assert tokenizer.encode("<s>hello \n<x>", start=False) == [1, *plain("hello"), 321]
    ids, spans = tokenizer.encode_with_spans("hello <x>é")
    assert [("hello <x>é"[a:b]) for a, b in spans[-3:]] == [" <x>", "é", "é"] and ids[-3] == 321
    assert tokenizer.decode([1, *hello, 320, *plain(" world"), 321, 999]) == "hello world<x> \u2047 ".replace(
        " \u2047 ", tokenizer.processor.decode([0])
    )
    assert tokenizer.decode([*hello, 321, *plain(" world")]) == "hello<x> world"
    legacy = load_model({**names, "legacy": True, "added_tokens_decoder": added})
    assert legacy.encode("hello[INST]world") == [*hello, 320, *world]
    bare = load_model({**names, "add_bos_token": False, "add_prefix_space": False})
    assert (bare.start_ids, bare.encode("hello"), bare.decode(plain(" a"))) == ((), plain("hello"), " a")


@pytest.mark.parametrize("legacy", [True, False])
@settings(max_examples=100, deadline=None)
@given(text=TEXT)
def test_spans_of_a_model(sentencepiece_model, tmp_path_factory, legacy, text):
    directory = tmp_path_factory.getbasetemp() / f"spans-{legacy}"
    if not directory.exists():
        write(directory, tokenizer_config={"eos_token": "</s>", "legacy": legacy})
        (directory / "tokenizer.model").write_bytes(sentencepiece_model)
    tokenizer = tokenizer_lib.load(directory)
    ids, spans = tokenizer.encode_with_spans(text)
    assert ids == tokenizer.encode(text) and len(ids) == len(spans)
    position = 0
    for begin, end in spans:
        assert begin == end or position - 1 <= begin <= position
        position = max(position, end)
    assert position == len(text)


def test_chats_with_a_model(load_model):
    source = chat_examples.TEMPLATES["mistral"]
    config = {"bos_token": "<s>", "eos_token": "</s>"}
    by_construction = load_model({**config, "chat_template": chat_examples.unmarked(source)})
    by_markers = load_model({**config, "chat_template": chat_examples.marked(source)})
    for messages in chat_examples.conversations(40, seed=2):
        encoded = [chat.encode_record(one, {"messages": messages}) for one in (by_construction, by_markers)]
        for one, other in zip(*encoded, strict=True):
            assert one.tolist() == other.tolist()
        tokens, response_mask = encoded[0]
        contents = [m["content"].strip() for m in messages if m["role"] == "assistant"]
        ends = [i for i in range(len(tokens)) if response_mask[i] and not response_mask[i + 1 : i + 2].any()]
        assert [tokens[i] for i in ends] == [2] * len(contents)
        starts = [i for i in range(len(tokens)) if response_mask[i] and not response_mask[i - 1]]
        decoded = [by_markers.decode(tokens[a : b + 1], start=False) for a, b in zip(starts, ends, strict=True)]
        assert [text.strip() for text in decoded] == contents


def test_a_model_that_normalizes_text_cannot_be_trained_on_chats(tmp_path, sentencepiece_model):
    template = chat_examples.unmarked(chat_examples.TEMPLATES["mistral"])
    write(tmp_path, tokenizer_config={"chat_template": template, "eos_token": "</s>"})
    override = b"\x1a\x02\x20\x01"  # normalizer_spec { remove_extra_whitespaces: true }
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model + override)
    tokenizer = tokenizer_lib.load(tmp_path)
    messages = [{"role": "user", "content": "a   b"}, {"role": "assistant", "content": "c"}]
    with pytest.raises(InputError, match="this SentencePiece model normalizes text"):
        chat.encode_record(tokenizer, {"messages": messages})
