"""Streamed text: independent of how the tokens are grouped, and truncated before the first stop string."""

import itertools

import chat_examples
import pytest
import tiny
import tokenizer_files
from hypothesis import given, settings
from hypothesis import strategies as st

from msn_jax.data import tokenizer as tokenizers
from msn_jax.decode.text import TextStream

SETTINGS = settings(derandomize=True, deadline=None, max_examples=300)
KINDS = ("trained here", "byte level", "llama", "metaspace")
SPLITS = st.lists(st.integers(0, 40), max_size=12)


@pytest.fixture(scope="module")
def tokenizer(request, tmp_path_factory):
    if request.param == "trained here":
        return tiny.tokenizer()
    directory = tmp_path_factory.mktemp("tokenizer")
    if request.param == "byte level":
        chat_examples.write_directory(directory, None)
    else:
        style = {"llama": tokenizer_files.llama_style, "metaspace": tokenizer_files.metaspace_style}[request.param]
        names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        tokenizer_files.write(directory, style().to_str(), names)
    return tokenizers.load(directory)


def split_at(ids: list[int], splits: list[int]) -> list[list[int]]:
    """The ids in groups, some of which may be empty."""
    ends = [0, *sorted(min(split, len(ids)) for split in splits), len(ids)]
    return [ids[begin:end] for begin, end in itertools.pairwise(ends)]


def stream_all(stream: TextStream, groups: list[list[int]]) -> str:
    return "".join([*(stream.push(group) for group in groups), stream.finish()])


@pytest.mark.parametrize("tokenizer", KINDS, indirect=True)
@pytest.mark.parametrize("start", [True, False])
@SETTINGS
@given(text=tokenizer_files.TEXT | st.text("héł€日🙂 \n", max_size=30), splits=SPLITS)
def test_streamed_text_equals_the_encoded_text(tokenizer, start, text, splits):
    ids = tokenizer.encode(text, start=start)
    stream = TextStream(tokenizer, start)
    assert stream_all(stream, split_at(ids, splits)) == tokenizer.decode(ids, start=start)
    assert (stream.tokens, stream.stopped) == (ids, False)


def random_ids(size: int) -> st.SearchStrategy:
    """Any ids, with more control symbols and bytes (the first ids), which make broken characters more frequent."""
    return st.lists(st.integers(0, size - 1) | st.integers(0, min(size - 1, 270)), max_size=40)


@pytest.mark.parametrize("tokenizer", KINDS[:2], indirect=True)
@pytest.mark.parametrize("start", [True, False])
@SETTINGS
@given(data=st.data(), splits=SPLITS)
def test_streamed_text_equals_decoding_for_any_tokens(tokenizer, start, data, splits):
    ids = data.draw(random_ids(tokenizer.vocab_size))
    assert stream_all(TextStream(tokenizer, start), split_at(ids, splits)) == tokenizer.decode(ids, start=start)


@pytest.mark.parametrize("tokenizer", KINDS, indirect=True)
@SETTINGS
@given(data=st.data(), splits=SPLITS, stop=st.lists(st.text("abe\n \ufffd€", min_size=1, max_size=4), max_size=2))
def test_text_and_end_do_not_depend_on_the_grouping(tokenizer, data, splits, stop):
    """Even where the decoders of `tokenizers` turn whole characters into U+FFFD because broken ones follow: text that
    was emitted stays.
    """
    ids = data.draw(random_ids(tokenizer.vocab_size))
    streams = [TextStream(tokenizer, True, stop) for _ in range(3)]
    groupings = ([ids], split_at(ids, splits), [[number] for number in ids])
    texts = [stream_all(stream, groups) for stream, groups in zip(streams, groupings, strict=True)]
    assert texts[0] == texts[1] == texts[2]
    assert streams[0].tokens == streams[1].tokens == streams[2].tokens
    assert streams[0].stopped == streams[1].stopped == streams[2].stopped


@pytest.mark.parametrize("tokenizer", KINDS, indirect=True)
def test_multibyte_characters_are_emitted_whole(tokenizer):
    text = "日本語日本語🙂日本🙂🙂日本語 abc 日本語"  # longer than the window of tokens that is decoded again
    ids = tokenizer.encode(text)
    stream = TextStream(tokenizer, True)
    emitted = "".join(stream.push([number]) for number in ids)
    assert emitted + stream.finish() == text
    assert "\ufffd" not in emitted


@pytest.mark.parametrize("tokenizer", KINDS[2:], indirect=True)
@pytest.mark.parametrize("before", ["", "hello a b c d e f g h "])
def test_a_broken_character_does_not_corrupt_the_one_before_it(tokenizer, before):
    """`tokenizers` decodes all of a run of bytes as U+FFFD if one of them is invalid."""
    ids = tokenizer.encode(before + "€", start=False)
    broken = [3 + 0xFF, *tokenizer.encode("a", start=False)]
    assert tokenizer.decode(ids + broken, start=False) == before + "\ufffd" * 4 + "a"
    for groups in ([ids, broken], [ids + broken], [[number] for number in ids + broken]):
        assert stream_all(TextStream(tokenizer, False), groups) == before + "€\ufffda"


@pytest.mark.parametrize("tokenizer", KINDS, indirect=True)
@SETTINGS
@given(
    text=st.text("abc ", min_size=1, max_size=24),
    stop=st.lists(st.text("abc ", min_size=1, max_size=5), min_size=1, max_size=3),
    splits=SPLITS,
)
def test_a_stop_string_ends_the_text(tokenizer, text, stop, splits):
    ids = tokenizer.encode(text, start=False)
    stream = TextStream(tokenizer, False, stop)
    text = stream_all(stream, split_at(ids, splits))
    prefixes = [tokenizer.decode(ids[:count], start=False) for count in range(len(ids) + 1)]
    first = next((count for count, prefix in enumerate(prefixes) if any(string in prefix for string in stop)), None)
    if first is None:
        assert (text, stream.tokens, stream.stopped) == (prefixes[-1], ids, False)
    else:
        whole = prefixes[first]
        assert text == whole[: min(whole.index(string) for string in stop if string in whole)]
        assert (stream.tokens, stream.stopped) == (ids[:first], True)


@pytest.mark.parametrize(
    ("stop", "pieces", "text"),
    [
        (["d e"], ["abc", " ", "d", " ", "e", "f"], "abc "),  # across three tokens
        (["abc"], ["a", "b", "c", "d"], ""),  # at the beginning
        (["aab"], ["a", "a", "a", "b", "c"], "a"),  # the first `a` is held back, then emitted
        (["abx", "bc"], ["a", "b", "c"], "a"),  # the second begins inside a partial match of the first
        (["x", "abc"], ["a", "b", "c", "x"], ""),  # two: the earlier one
    ],
)
def test_stop_strings(stop, pieces, text):
    tokenizer = tiny.tokenizer()
    stream = TextStream(tokenizer, False, stop)
    emitted = []
    for piece in pieces:
        for number in tokenizer.encode(piece, start=False):
            emitted.append(stream.push([number]))
            assert text.startswith("".join(emitted))  # emitted text is never taken back
    assert "".join(emitted) + stream.finish() == text
    assert stream.stopped


def test_a_partial_stop_string_is_emitted_once_it_cannot_complete():
    tokenizer = tiny.tokenizer()
    stream = TextStream(tokenizer, False, ["ab!"])
    emitted = [stream.push([number]) for letter in "ab?ab" for number in tokenizer.encode(letter, start=False)]
    assert emitted == ["", "", "ab?", "", ""]
    assert stream.finish() == "ab"
