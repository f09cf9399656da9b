"""Programs that read GGUF models: conversion, training and calibration."""

import dataclasses
import functools

import commands
import gguf_files
import jax
import numpy as np
import pytest
import tiny_config
from gguf import GGMLQuantizationType as Quantization
from gguf_files import MODELS, assert_refused, assert_same_tree, random_tensors
from vocabularies import TEXTS, trained

from msn_jax import adapter, pretrained, train
from msn_jax.config import AdapterConfig, LlamaConfig
from msn_jax.convert import convert
from msn_jax.data import tokenizer as tokenizers
from msn_jax.gguf import model, tokenizer_files

pytestmark = pytest.mark.usefixtures("quick_compilation")


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
        tmp_path / "chat.gguf",
        random_tensors(cfg),
        cfg,
        quantization=Quantization.Q8_0,
        vocabulary=vocabulary,
    )
    return tmp_path / "chat.gguf"


def test_convert_writes_a_hugging_face_directory_of_the_same_model(chat_model, tmp_path):
    convert(str(chat_model), str(tmp_path / "converted"))
    source, converted = (pretrained.load(path, stacked=False) for path in (chat_model, tmp_path / "converted"))
    assert_same_tree(converted.params, source.params)
    assert converted.cfg == source.cfg == pretrained.read_config(chat_model)
    ours, theirs = (tokenizers.load(path) for path in (chat_model, tmp_path / "converted"))
    assert (ours.start_ids, ours.stop_ids, ours.vocab_size) == (theirs.start_ids, theirs.stop_ids, theirs.vocab_size)
    assert [ours.encode(text) for text in TEXTS] == [theirs.encode(text) for text in TEXTS]
    assert_refused(tmp_path / "no.gguf", f"{tmp_path / 'no.gguf'}: no such file", pretrained.directory)


def test_an_adapter_is_merged_into_the_export_of_a_gguf_model(chat_model, tmp_path):
    cfg, lora = pretrained.read_config(chat_model), AdapterConfig(rank=4, alpha=4.0, first_layer=1, gate="all")
    shapes = adapter.shapes(cfg, lora)
    rng = np.random.default_rng(0)

    def stack(*shape):
        return rng.normal(size=(cfg.n_layers - 1, *shape)).astype(np.float32)

    params = {name: (stack(inputs, 4), stack(4, outputs)) for name, (inputs, outputs) in shapes.items()}
    adapter.save(adapter.Adapter(params, lora, None), tmp_path / "adapter", str(chat_model))
    convert(str(chat_model), str(tmp_path / "merged"), adapter=str(tmp_path / "adapter"))
    base, merged = (pretrained.load(path, stacked=True) for path in (chat_model, tmp_path / "merged"))
    assert merged.cfg == base.cfg
    assert tokenizers.load(tmp_path / "merged").stop_ids == tokenizers.load(chat_model).stop_ids
    expected = adapter.merge(base.params, params, lora)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5), merged.params, expected)
    assert (
        np.abs(np.asarray(merged.params["layers"]["attention"]["q"] - base.params["layers"]["attention"]["q"])).max()
        > 1
    )


def test_a_run_starts_from_a_gguf_model(chat_model, tmp_path):
    cfg = tiny_config.config_in(tmp_path, init_from=str(chat_model))
    cfg.model = model.load_config(chat_model)
    source = train.starting_point(cfg)
    assert source == chat_model
    tokenizer = train.load_tokenizer(cfg, tmp_path / "run", source, resumed=False)
    assert tokenizer.files == tokenizer_files.tokenizer_files(chat_model)
    cfg.model = dataclasses.replace(cfg.model, rope_theta=7.0)
    assert_refused(
        chat_model, "its model has rope_theta=77.0, config.model.rope_theta is 7.0", lambda _: train.starting_point(cfg)
    )


def test_calibrate_needs_an_output_for_a_gguf_model(chat_model, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n' * 4)
    words = f"--model={chat_model}: is a GGUF file, next to which no tree is stored: name a JSON file with --output"
    commands.assert_refused(
        "msn_jax.calibrate", [([f"--model={chat_model}", "--prompts=prompts.jsonl"], words)], tmp_path
    )
