"""The rotary position embedding (RoFormer, arXiv 2104.09864) and its scalings; axes as in `llama.py`."""

import functools

import jax.numpy as jnp
import numpy as np
from jax import Array

from msn_jax.config import LlamaConfig

Rope = tuple[Array, Array]  # cos and sin, [B, T, 1, H/2] each


def inverse_frequencies(cfg: LlamaConfig) -> np.ndarray:
    """float32 [H/2]: radians per position of each rotated pair, theta ** (-2h / H), scaled for longer contexts.

    'linear' divides all frequencies by the factor (arXiv 2306.15595). 'llama3' divides those with wavelengths above
    original_length / low_frequency_factor, keeps those with wavelengths below original_length / high_frequency_factor,
    and interpolates linearly in between, in turns per original context (reference code of Llama 3.1). All in float32,
    as checkpoints were trained: one unit in the last place is 0.01 radians at position 100,000.
    """
    one = np.float32(1)
    exponent = np.arange(0, cfg.head_dim, 2, dtype=np.float32) / np.float32(cfg.head_dim)
    inverse = one / np.float32(cfg.rope_theta) ** exponent
    if cfg.rope_scaling == "none":
        return inverse
    scaled = inverse / np.float32(cfg.rope_factor)
    if cfg.rope_scaling == "linear":
        return scaled
    if cfg.rope_scaling != "llama3":
        raise ValueError(f"unknown rope scaling {cfg.rope_scaling!r}")
    low, high = np.float32(cfg.rope_low_frequency_factor), np.float32(cfg.rope_high_frequency_factor)
    turns = np.float32(cfg.rope_original_length) / (np.float32(2 * np.pi) / inverse)
    kept = np.clip((turns - low) / (high - low), np.float32(0), one)
    return (one - kept) * scaled + kept * inverse


def rotary_angles(positions: Array, cfg: LlamaConfig, longest: int) -> Rope:
    """cos and sin [B, T, 1, H/2] of the rotary embedding (RoFormer, arXiv 2104.09864), in float32.

    Lookups in a table of the positions below `longest`, NaN beyond. XLA computes the table once per program; it would
    recompute the cosine of `positions` at every use, twice per layer and forward pass.
    """
    angles = jnp.arange(longest, dtype=jnp.float32)[:, None] * inverse_frequencies(cfg)[None, :]
    look_up = functools.partial(jnp.take, indices=positions[:, :, None], axis=0, fill_value=jnp.nan)
    return look_up(jnp.cos(angles)), look_up(jnp.sin(angles))


def rotate(x: Array, rope: Rope) -> Array:
    """Rotates the pairs (x[h], x[h + H/2]) of [B, T, heads, H]: the half-split layout of Hugging Face checkpoints."""
    cos, sin = rope
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
