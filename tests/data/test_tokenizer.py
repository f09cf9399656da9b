"""Our own SentencePiece tokenizers, and SentencePiece models alone."""

import io

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from msn_jax.cli import InputError
from msn_jax.data import tokenizer as tokenizer_lib

TEXTS = [
    "def area(width, height):\n    return width * height\n",
    "class Shape:\n\n    def __init__(self, name='<s>'):\n        self.name = name\n",
    "for i in range(10):\n\tprint(i, '<|user|>', \"<0x41>\")\n",
    "été – naïve – U+2581: \u2581, NUL: \0, U+2585: \u2585\n",
] * 20

# Characters and strings that SentencePiece treats specially, and some that it might.
AWKWARD = st.sampled_from(
    [*" \u2581\u2585\0\n\t\r<>|s/ax4é\u2047\ufffd\ufeff\U0001f600", "<s>", "</s>", "<0x41>", "<|user|>", "<|end|>"]
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tokenizer_lib.train(TEXTS, 400, tmp_path_factory.mktemp("own") / "tokenizer.model")


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """A model in the style of Llama 2: dummy prefix, no role symbols, no padding id."""
    proto = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS[:3] * 20),
        model_writer=proto,
        model_type="bpe",
        vocab_size=380,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("foreign") / "tokenizer.model"
    path.write_bytes(proto.getvalue())
    return tokenizer_lib.load(path)


@settings(max_examples=300, deadline=None)
@given(text=st.text() | st.lists(AWKWARD).map("".join))
def test_decoding_inverts_encoding(tokenizer, foreign, text):
    for model in (tokenizer, foreign):
        ids = model.encode(text)
        assert model.decode(ids) == text
        assert not any(model.processor.is_control(i) for i in ids)


@settings(max_examples=300, deadline=None)
@given(first=st.lists(AWKWARD, min_size=1).map("".join), second=st.lists(AWKWARD).map("".join))
def test_a_continuation_adds_no_space(tokenizer, foreign, first, second):
    for model in (tokenizer, foreign):
        assert model.decode(model.encode(first) + model.encode(second, start=False)) == first + second


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(-2, 500)))
def test_any_ids_decode(tokenizer, ids):
    text = tokenizer.decode(ids)
    assert text.encode("utf-8").decode("utf-8") == text  # no lone surrogate


def test_special_ids_decode_to_nothing(tokenizer):
    a, first_byte = tokenizer.encode("a"), tokenizer.processor.piece_to_id("<0xC3>")
    textless = [0, tokenizer.bos_id, *tokenizer.stop_ids, *tokenizer.role_ids.values()]
    assert tokenizer.decode([*textless, *a, *textless]) == "a"
    assert tokenizer.decode([*a, first_byte]) == "a\ufffd"
    assert tokenizer.decode([*a, tokenizer.vocab_size, -1, tokenizer.processor.unk_id()]) == "a\ufffd\ufffd\ufffd"


def test_a_lone_surrogate_becomes_the_replacement_character(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"


def test_control_ids(tokenizer):
    names = [tokenizer.processor.id_to_piece(i) for i in range(8)]
    assert names == ["<pad>", "<s>", "</s>", "<unk>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.end_id) == (1, 2, 7)
    assert tokenizer.role_ids == {"system": 4, "user": 5, "assistant": 6}
    assert tokenizer.stop_ids == (2, 7)
    assert tokenizer.vocab_size == 400


def test_indentation_takes_one_token(tokenizer):
    assert len(tokenizer.encode(" " * 8)) == 1


def test_a_foreign_model(foreign):
    assert (foreign.bos_id, foreign.eos_id) == (1, 2)
    assert (foreign.role_ids, foreign.end_id, foreign.stop_ids) == (None, None, (2,))
    assert foreign.processor.id_to_piece(foreign.encode("a")[0]).startswith("\u2581")
    assert foreign.encode("a", start=False) == [foreign.processor.piece_to_id("a")]


def test_training_is_deterministic_quiet_and_stored(tokenizer, tmp_path, capfd):
    path = tmp_path / "new" / "tokenizer.model"
    again = tokenizer_lib.train(TEXTS, 400, path)
    assert path.read_bytes() == tokenizer.processor.serialized_model_proto()
    assert tokenizer_lib.load(path).encode(TEXTS[0]) == again.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])
    assert [p.name for p in path.parent.iterdir()] == ["tokenizer.model"]
    assert capfd.readouterr() == ("", "")


def test_training_reads_an_even_sample_of_long_texts(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer_lib, "_MAX_CHUNKS", 4)
    texts = ["first " * 400, "second " * 400, "third " * 400, "fourth " * 400] * 3
    model = tokenizer_lib.train(texts, 300, tmp_path / "tokenizer.model")  # every third text
    assert len(model.encode(" first")) == len(model.encode(" third")) == 1


def test_save_writes_what_load_reads(foreign, tmp_path):
    tokenizer_lib.save(foreign, tmp_path)
    assert tokenizer_lib.load(tmp_path).encode("a b") == foreign.encode("a b")


@pytest.mark.parametrize(
    ("texts", "vocab_size", "message"),
    [
        (["hello world"], 200, "config.model.vocab_size=200: too small: this text needs at least 272"),
        (["hello world"], 5000, "config.model.vocab_size=5000: too large for this text: at most 290"),
        ([], 300, "no text to train a tokenizer on"),
        (["\0\u2581", " "], 300, "no text to train a tokenizer on"),
    ],
)
def test_training_refuses(texts, vocab_size, message, tmp_path):
    with pytest.raises(InputError) as caught:
        tokenizer_lib.train(texts, vocab_size, tmp_path / "tokenizer.model")
    assert str(caught.value) == message
    assert not list(tmp_path.iterdir())


def test_loading_refuses(tokenizer, tmp_path):
    proto = tokenizer.processor.serialized_model_proto()
    path = tmp_path / "tokenizer.model"
    with pytest.raises(InputError) as caught:
        tokenizer_lib.load(path)
    assert str(caught.value) == f"{path}: cannot read the tokenizer: No such file or directory"
    for content in (b"", b"not a model", proto[: len(proto) // 2], proto[:-1]):
        path.write_bytes(content)
        with pytest.raises(InputError, match="damaged") as caught:
            tokenizer_lib.load(path)
        assert str(caught.value).startswith(f"{path}: not a SentencePiece model")
