"""Random models small enough to decode hundreds of texts in a test."""

import numpy as np
import random_params

from msn_jax.config import LlamaConfig


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
