"""Text as it comes: the pieces are the whole, whoever dealt the tokens, and end where a stop string begins."""

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
KINDS = ("our own", "byte level", "llama", "metaspace")
CUTS = st.lists(st.integers(0, 40), max_size=12)


@pytest.fixture(scope="module")
def tokenizer(request, tmp_path_factory):
    if request.param == "our own":
        return tiny.tokenizer()
    directory = tmp_path_factory.mktemp("tokenizer")
    if request.param == "byte level":
        chat_examples.write_directory(directory, None)
    else:
        style = {"llama": tokenizer_files.llama_style, "metaspace": tokenizer_files.metaspace_style}[request.param]
        names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        tokenizer_files.write(directory, style().to_str(), names)
    return tokenizers.load(directory)


def deal(ids: list[int], cuts: list[int]) -> list[list[int]]:
    """The ids in pieces, some of them perhaps empty."""
    ends = [0, *sorted(min(cut, len(ids)) for cut in cuts), len(ids)]
    return [ids[begin:end] for begin, end in itertools.pairwise(ends)]


def streamed(stream: TextStream, deals: list[list[int]]) -> str:
    return "".join([*(stream.push(part) for part in deals), stream.finish()])


@pytest.mark.parametrize("tokenizer", KINDS, indirect=True)
@pytest.mark.parametrize("start", [True, False])
@SETTINGS
@given(text=tokenizer_files.TEXT | st.text("héł€日🙂 \n", max_size=30), cuts=CUTS)
def test_pieces_of_a_text_are_the_text(tokenizer, start, text, cuts):
    ids = tokenizer.encode(text, start=start)
    stream = TextStream(tokenizer, start)
    assert streamed(stream, deal(ids, cuts)) == tokenizer.decode(ids, start=start)
    assert (stream.tokens, stream.stopped) == (ids, False)


def random_ids(size: int) -> st.SearchStrategy:
    """Any ids; those in front are control symbols and bytes, which are more often broken when they are more often."""
    return st.lists(st.integers(0, size - 1) | st.integers(0, min(size - 1, 270)), max_size=40)


@pytest.mark.parametrize("tokenizer", KINDS[:2], indirect=True)
@pytest.mark.parametrize("start", [True, False])
@SETTINGS
@given(data=st.data(), cuts=CUTS)
def test_pieces_of_any_tokens_are_what_they_decode_to(tokenizer, start, data, cuts):
    ids = data.draw(random_ids(tokenizer.vocab_size))
    assert streamed(TextStream(tokenizer, start), deal(ids, cuts)) == tokenizer.decode(ids, start=start)


@pytest.mark.parametrize("tokenizer", KINDS, indirect=True)
@SETTINGS
@given(data=st.data(), cuts=CUTS, stop=st.lists(st.text("abe\n \ufffd€", min_size=1, max_size=4), max_size=2))
def test_no_dealing_changes_the_text(tokenizer, data, cuts, stop):
    """Nor where it ends. A decoder of `tokenizers` spells whole characters as U+FFFD when broken ones follow; what was
    shown stays shown.
    """
    ids = data.draw(random_ids(tokenizer.vocab_size))
    streams = [TextStream(tokenizer, True, stop) for _ in range(3)]
    deals = ([ids], deal(ids, cuts), [[number] for number in ids])
    texts = [streamed(stream, dealt) for stream, dealt in zip(streams, deals, strict=True)]
    assert texts[0] == texts[1] == texts[2]
    assert streams[0].tokens == streams[1].tokens == streams[2].tokens
    assert streams[0].stopped == streams[1].stopped == streams[2].stopped


@pytest.mark.parametrize("tokenizer", KINDS, indirect=True)
def test_characters_of_many_bytes_stay_whole(tokenizer):
    text = "日本語日本語🙂日本🙂🙂日本語 abc 日本語"  # longer than the tokens that are decoded again
    ids = tokenizer.encode(text)
    stream = TextStream(tokenizer, True)
    pieces = [stream.push([number]) for number in ids]
    assert "".join(pieces) + stream.finish() == text
    assert "\ufffd" not in "".join(pieces)


@pytest.mark.parametrize("tokenizer", KINDS[2:], indirect=True)
@pytest.mark.parametrize("before", ["", "hello a b c d e f g h "])
def test_a_broken_character_spoils_none_before_it(tokenizer, before):
    """All bytes beside each other become U+FFFD there when one of them is wrong."""
    ids = tokenizer.encode(before + "€", start=False)
    wrong = [3 + 0xFF, *tokenizer.encode("a", start=False)]
    assert tokenizer.decode(ids + wrong, start=False) == before + "\ufffd" * 4 + "a"
    for deals in ([ids, wrong], [ids + wrong], [[number] for number in ids + wrong]):
        assert streamed(TextStream(tokenizer, False), deals) == before + "€\ufffda"


@pytest.mark.parametrize("tokenizer", KINDS, indirect=True)
@SETTINGS
@given(
    text=st.text("abc ", min_size=1, max_size=24),
    stop=st.lists(st.text("abc ", min_size=1, max_size=5), min_size=1, max_size=3),
    cuts=CUTS,
)
def test_a_stop_string_ends_the_text(tokenizer, text, stop, cuts):
    ids = tokenizer.encode(text, start=False)
    stream = TextStream(tokenizer, False, stop)
    found = streamed(stream, deal(ids, cuts))
    prefixes = [tokenizer.decode(ids[:count], start=False) for count in range(len(ids) + 1)]
    first = next((count for count, prefix in enumerate(prefixes) if any(one in prefix for one in stop)), None)
    if first is None:
        assert (found, stream.tokens, stream.stopped) == (prefixes[-1], ids, False)
    else:
        whole = prefixes[first]
        assert found == whole[: min(whole.index(one) for one in stop if one in whole)]
        assert (stream.tokens, stream.stopped) == (ids[:first], True)


@pytest.mark.parametrize(
    ("stop", "pieces", "text"),
    [
        (["d e"], ["abc", " ", "d", " ", "e", "f"], "abc "),  # across three tokens
        (["abc"], ["a", "b", "c", "d"], ""),  # at the beginning
        (["aab"], ["a", "a", "a", "b", "c"], "a"),  # the wrong `a` was held back, and is shown after all
        (["abx", "bc"], ["a", "b", "c"], "a"),  # the second begins inside what might have been the first
        (["x", "abc"], ["a", "b", "c", "x"], ""),  # two: the one that is there first
    ],
)
def test_stop_strings_by_hand(stop, pieces, text):
    tokenizer = tiny.tokenizer()
    stream = TextStream(tokenizer, False, stop)
    shown = []
    for piece in pieces:
        for number in tokenizer.encode(piece, start=False):
            shown.append(stream.push([number]))
            assert text.startswith("".join(shown))  # nothing is shown that does not stay
    assert "".join(shown) + stream.finish() == text
    assert stream.stopped


def test_what_may_become_a_stop_string_is_shown_when_it_did_not():
    tokenizer = tiny.tokenizer()
    stream = TextStream(tokenizer, False, ["ab!"])
    shown = [stream.push([number]) for letter in "ab?ab" for number in tokenizer.encode(letter, start=False)]
    assert shown == ["", "", "ab?", "", ""]
    assert stream.finish() == "ab"
