"""Random models small enough to decode hundreds of texts in a test."""

import dataclasses
import functools
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest
import random_params

from msn_jax import checkpoint
from msn_jax.config import LlamaConfig
from msn_jax.data import tokenizer as tokenizers
from msn_jax.data.tokenizer import Tokenizer
from msn_jax.decode import session
from msn_jax.decode.session import Model
from msn_jax.decode.verify import Sampler


def config(vocab_size: int = 13, n_heads: int = 4, n_kv_heads: int = 2, max_length: int = 512) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab_size,
        d_model=32,
        n_layers=2,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=8,
        d_mlp=48,
        max_length=max_length,
        rope_theta=777.0,
        rope_scaling="none",
        sliding_window=0,
        norm_eps=1e-3,
        qkv_bias=False,
        qk_norm=False,
        tie_embeddings=n_heads != n_kv_heads,
        dtype="float32",
        param_dtype="float32",
    )


def sampler(
    count: int, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, seed: int = 9
) -> Sampler:
    """The same settings for every row, and a key for each."""
    return Sampler(
        temperature=np.full(count, temperature, np.float32),
        top_k=np.full(count, top_k, np.int32),
        top_p=np.full(count, top_p, np.float32),
        min_p=np.full(count, min_p, np.float32),
        keys=jax.random.split(jax.random.key(seed), count),
    )


def params(cfg: LlamaConfig, seed: int) -> dict:
    """Decoding layout; weights large enough that texts do not fall into one fixed point at once."""
    return random_params.unstacked(cfg, seed, gain=1.5)


def prompts(rng: np.random.Generator, count: int, vocab_size: int, longest: int = 24) -> list[list[int]]:
    """Texts of different lengths; two thirds of them with long runs of one token."""
    texts = []
    for number in range(count):
        text = rng.integers(0, vocab_size, rng.integers(1, longest + 1)).tolist()
        if number % 3:
            start = int(rng.integers(0, len(text)))
            text[start:] = [text[start]] * (len(text) - start)
        texts.append(text)
    return texts


@functools.cache
def tokenizer() -> Tokenizer:
    """Our own kind, of 320 pieces."""
    text = "the cat sat on the mat, and a dog sat on the cat: three and four is seven, five and six is eleven. "
    with tempfile.TemporaryDirectory() as directory:
        return tokenizers.train([text] * 9, 320, f"{directory}/tokenizer.model")


@functools.cache
def model(max_length: int = 256, seed: int = 0) -> Model:
    """A random model with a tokenizer, for texts without sense."""
    cfg = config(320, max_length=max_length)
    return Model(params(cfg, seed), cfg, tokenizer())


def endless(model: Model) -> Model:
    """The same, where no token ends a text."""
    return dataclasses.replace(model, tokenizer=dataclasses.replace(model.tokenizer, stop_ids=(-1,)))


def small_caches(monkeypatch: pytest.MonkeyPatch, slots: int) -> None:
    """First caches of `slots` tokens, or little more than their prompts: answers outgrow them."""
    monkeypatch.setattr(session, "_SMALLEST_BUCKET", slots)
    monkeypatch.setattr(session, "_INITIAL_OUTPUT", 1)


def write_model(directory: Path, max_length: int = 256, seed: int = 0) -> None:
    """A workdir, whose unembedding is not the table of the embedding: the models that are trained in tests share it."""
    with checkpoint.whole_directory(directory) as workdir:
        tokenizers.save(tokenizer(), workdir)
        cfg = dataclasses.replace(config(320, max_length=max_length), tie_embeddings=False)
        checkpoint.save_model(workdir, random_params.stacked(cfg, seed, gain=1.5), cfg)
