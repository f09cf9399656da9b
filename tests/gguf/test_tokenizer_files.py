"""Tokenizers of GGUF files equal the original ones; refusals."""

import io
import json

import gguf
import gguf_files
import pytest
import sentencepiece
import tokenizers
from gguf_files import assert_refused
from vocabularies import ORIGINAL, SPECIAL, TEXTS, USER_DEFINED, trained

from msn_jax.data import tokenizer as tokenizers_of_directories
from msn_jax.gguf import tokenizer_files


def loaded(vocabulary, tmp_path):
    gguf_files.write_vocabulary(tmp_path / "vocabulary.gguf", vocabulary)
    for name, content in tokenizer_files.tokenizer_files(tmp_path / "vocabulary.gguf").items():
        (tmp_path / name).write_bytes(content)
    return tokenizers_of_directories.load(tmp_path)


@pytest.mark.parametrize("pre", ORIGINAL)
def test_a_byte_level_bpe_equals_the_original(pre, tmp_path):
    backend = trained(pre)
    unknown, bos, eos = map(backend.token_to_id, SPECIAL)
    ids = {"bos_token_id": bos, "eos_token_id": eos, "eot_token_id": unknown}
    tokenizer = loaded(gguf_files.byte_level(backend, pre, **ids), tmp_path)
    for text in TEXTS:
        ids = backend.encode(text).ids
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == backend.decode(ids)
    assert USER_DEFINED in tokenizer.decode(tokenizer.encode(f"a{USER_DEFINED}</s>"))
    assert tokenizer.start_ids == ((bos,) if pre == "llama-bpe" else ())
    assert tokenizer.stop_ids == (eos, unknown)


def test_settings_of_a_file_precede_those_of_its_pre_tokenizer(tmp_path):
    backend = trained("llama-bpe")
    ids = {f"{name}_token_id": backend.token_to_id(token) for name, token in (("bos", "<s>"), ("eos", "</s>"))}
    vocabulary = gguf_files.byte_level(backend, "llama-bpe", **ids, add_bos_token=False, add_eos_token=True)
    tokenizer = loaded(vocabulary, tmp_path)
    assert tokenizer.start_ids == ()
    described = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert described.encode("a").ids == [*backend.encode("a").ids, ids["eos_token_id"]]


@pytest.mark.parametrize("prefix", [True, False])
def test_a_sentencepiece_vocabulary_equals_sentencepiece(prefix, tmp_path):
    proto = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text.replace("\0", "") for text in TEXTS] * 3),
        model_writer=proto,
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=prefix,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=proto.getvalue())
    keys = {} if prefix else {"add_space_prefix": False}  # true is the format's default
    tokenizer = loaded(gguf_files.pieces(processor, **keys), tmp_path)
    for text in TEXTS:
        if not any(token in text for token in SPECIAL):
            assert tokenizer.encode(text) == processor.encode(text)
            assert tokenizer.decode(processor.encode(text)) == text
    assert tokenizer.encode("a</s>b") == [*processor.encode("a"), processor.eos_id(), *processor.encode("b")]
    assert (tokenizer.start_ids, tokenizer.stop_ids) == ((processor.bos_id(),), (processor.eos_id(),))


def test_the_chat_template_and_the_names_of_tokens(tmp_path):
    backend = trained("smollm")
    ids = {f"{name}_token_id": backend.token_to_id(token) for name, token in (("bos", "<s>"), ("eos", "</s>"))}
    vocabulary = gguf_files.byte_level(backend, "smollm", **ids)
    writer = gguf.GGUFWriter(tmp_path / "vocabulary.gguf", "llama")
    gguf_files.add_keys(writer, {f"tokenizer.ggml.{key}": value for key, value in vocabulary.items()})
    writer.add_chat_template("{{ bos_token }}{{ messages[0].content }}")
    gguf_files.close(writer)
    files = tokenizer_files.tokenizer_files(tmp_path / "vocabulary.gguf")
    described = json.loads(files["tokenizer_config.json"])
    assert described["chat_template"] == "{{ bos_token }}{{ messages[0].content }}"
    assert (described["bos_token"], described["eos_token"]) == ("<s>", "</s>")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "bert"}, "key 'tokenizer.ggml.model' is 'bert': supported are gpt2 and llama"),
        ({"model": None}, "key 'tokenizer.ggml.model' is missing"),
        ({"pre": "exaone"}, "key 'tokenizer.ggml.pre' is 'exaone': known pre-tokenizers are deepseek-coder, "),
        ({"tokens": None}, "key 'tokenizer.ggml.tokens' is missing"),
        ({"merges": None}, "key 'tokenizer.ggml.merges' is missing"),
        ({"token_type": [1, 1]}, "key 'tokenizer.ggml.token_type' has 2 values for"),
        ({"eos_token_id": None}, "key 'tokenizer.ggml.eos_token_id' is missing"),
        ({"eos_token_id": 10**6}, "key 'tokenizer.ggml.eos_token_id' is 1000000: must be below"),
        ({"add_bos_token": "yes"}, "key 'tokenizer.ggml.add_bos_token' is 'yes': must be true or false"),
    ],
)
def test_an_unknown_vocabulary_is_refused(changes, message, tmp_path):
    vocabulary = gguf_files.byte_level(trained("smollm"), "smollm", bos_token_id=1, eos_token_id=2) | changes
    gguf_files.write_vocabulary(tmp_path / "vocabulary.gguf", vocabulary)
    assert_refused(tmp_path / "vocabulary.gguf", message, tokenizer_files.tokenizer_files)


def test_a_file_without_pre_tokenizer_is_read_by_the_default_rule_with_a_warning(tmp_path, capsys):
    backend = trained("gpt-2")
    tokenizer = loaded(gguf_files.byte_level(backend, None, bos_token_id=1, eos_token_id=2), tmp_path)
    assert capsys.readouterr().err.count("names no pre-tokenizer") == 1
    assert tokenizer.decode(tokenizer.encode("a b1234!")) == "a b1234!"
