"""Tokenizers of the library `tokenizers`."""

import chat_examples
import pytest
import tokenizers
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizer_files import AWKWARD, CHATML, TEXT, llama_style, metaspace_style, write

from msn_jax.data import chat
from msn_jax.data import tokenizer as tokenizer_lib


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    directory = tmp_path_factory.mktemp("byte_level")
    chat_examples.write_directory(directory, CHATML)
    return tokenizer_lib.load(directory)


@pytest.fixture(scope="module", params=[llama_style, metaspace_style])
def prefixed(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("prefixed")
    write(directory, request.param().to_str(), {"bos_token": "<s>", "eos_token": "</s>"})
    return tokenizer_lib.load(directory)


@settings(max_examples=200, deadline=None)
@given(parts=st.lists(TEXT, min_size=1, max_size=3))
def test_decoding_inverts_encoding_also_in_parts(byte_level, parts):
    assume(
        not any(special in part for part in parts for special in chat_examples.SPECIAL_TOKENS)
    )  # they decode to nothing
    ids = [i for n, part in enumerate(parts) for i in byte_level.encode(part, start=n == 0)]
    assert byte_level.decode(ids) == "".join(parts)
    assert max(ids, default=0) < byte_level.vocab_size


@settings(max_examples=200, deadline=None)
@given(first=st.lists(AWKWARD, min_size=1).map("".join), second=st.lists(AWKWARD).map("".join))
def test_a_continuation_neither_adds_nor_removes_a_space(prefixed, first, second):
    first, second = (text.replace("\u2581", "") for text in ("a" + first, second))
    assume(not any(special in text for text in (first, second) for special in ("<s>", "</s>")))
    ids, more = prefixed.encode(first), prefixed.encode(second, start=False)
    assert prefixed.decode(ids + more) == first + second
    assert prefixed.decode(more, start=False) == second


def test_a_dummy_prefix(prefixed):
    hello = prefixed.backend.token_to_id("\u2581hello")
    assert prefixed.encode("hello") == [hello]
    assert prefixed.encode("hello", start=False) == [prefixed.backend.token_to_id("hello")]
    assert (prefixed.decode([hello]), prefixed.decode([hello], start=False)) == ("hello", " hello")


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(-2, 500)))
def test_any_ids_decode(byte_level, prefixed, ids):
    for tokenizer in (byte_level, prefixed):
        for start in (True, False):
            text = tokenizer.decode(ids, start)
            assert text.encode("utf-8").decode("utf-8") == text


@settings(max_examples=100, deadline=None)
@given(ids=st.lists(st.integers(0, 290)))
def test_decoding_equals_the_library(byte_level, ids):
    full = tokenizers.Tokenizer.from_str(byte_level.files["tokenizer.json"].decode())
    assert byte_level.decode(ids) == full.decode(ids, skip_special_tokens=True)


def test_decoding_unknown_ids_and_incomplete_characters(byte_level):
    a, (first, *_) = byte_level.encode("a"), byte_level.encode("日")
    assert byte_level.decode([0, *a, 1, first]) == "a\ufffd"
    assert byte_level.decode([*a, 10**9, -1, *a]) == "a\ufffd\ufffda"
    assert byte_level.decode(byte_level.encode("a\ud800b")) == "a\ufffdb"


@settings(max_examples=150, deadline=None)
@given(text=TEXT)
def test_spans_cover_the_text(byte_level, prefixed, text):
    for tokenizer in (byte_level, prefixed):
        ids, spans = tokenizer.encode_with_spans(text)
        assert ids == tokenizer.encode(text) and len(ids) == len(spans)
        position = 0
        for begin, end in spans:
            assert position - 1 <= begin <= position <= max(end, position)  # a character may be several tokens
            position = max(end, position)
        assert position == len(text)


def test_the_record_of_a_prompt(prefixed):
    tokens, response_mask = chat.encode_record(prefixed, {"prompt": "hello", "response": " hello"})
    hello = prefixed.backend.token_to_id("\u2581hello")
    assert tokens.tolist() == [1, hello, hello, 2]
    assert response_mask.tolist() == [False, False, True, True]
    assert chat.encode_prompt(prefixed, "hello") == [1, hello]  # without the </s> of the post-processor
