"""Random models of known shapes, and the bytes that one forward pass reads.

A forward pass of a random model takes as long as one of a trained model of the same shape. Its completions and its
draft acceptance are meaningless.
"""

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array

from configs import demo, llama3_8b, stories260k
from msn_jax import llama
from msn_jax.config import LlamaConfig

_STORIES_110M = LlamaConfig(  # stories110M (karpathy/llama2.c)
    vocab_size=32_000,
    d_model=768,
    n_layers=12,
    n_heads=12,
    n_kv_heads=12,
    head_dim=64,
    d_mlp=2048,
    max_length=1024,
    rope_theta=10_000.0,
    rope_scaling="none",
    sliding_window=0,
    norm_eps=1e-5,
    qkv_bias=False,
    qk_norm=False,
    tie_embeddings=True,
    dtype="float32",
    param_dtype="float32",
)
SHAPES = {
    "260k": stories260k.get_config("msn").model,
    "demo": demo.get_config("msn").model,
    "110m": _STORIES_110M,
    "1b": dataclasses.replace(  # Llama 3.2 1B; its rope is scaled from an original length of 8,192 tokens
        llama3_8b.get_config("msn").model,
        d_model=2048,
        n_layers=16,
        head_dim=64,
        d_mlp=8192,
        max_length=131_072,
        rope_scaling="llama3",
        rope_factor=32.0,
        rope_low_frequency_factor=1.0,
        rope_high_frequency_factor=4.0,
        rope_original_length=8192,
        tie_embeddings=True,
    ),
    "8b": llama3_8b.get_config("msn").model,
}


def config(shape: str, dtype: str) -> LlamaConfig:
    """The config of a shape, with parameters and computation in `dtype`."""
    return dataclasses.replace(SHAPES[shape], dtype=dtype, param_dtype=dtype)


def random_params(cfg: LlamaConfig, seed: int = 0) -> dict:
    """Random parameters in the decoding layout, generated on the device, one at a time.

    Every matrix has a standard deviation of fan_in ** -0.5, including those that training initializes to zero, so that
    every layer contributes to the output.
    """
    like = nn.meta.unbox(llama.abstract(cfg, False))
    params = {}
    for number, (name, leaf) in enumerate(flatten_dict(like, sep="/").items()):
        if name.endswith("scale"):
            params[name] = jnp.ones(leaf.shape, leaf.dtype)
            continue
        fan_in = cfg.d_model if "embed" in name or name.endswith(("q", "k", "v")) else leaf.size // leaf.shape[-1]
        params[name] = draw(np.uint32(seed * 4096 + number), leaf.shape, leaf.dtype, fan_in**-0.5)
    return unflatten_dict(params, sep="/")


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def draw(stream: Array, shape: tuple[int, ...], dtype: str, deviation: float) -> Array:
    """Uniform random numbers with mean 0 and standard deviation `deviation`.

    They come from an integer hash, which is fast and gives the same numbers on every device. `stream`, a uint32 scalar,
    selects a different sequence for each array.
    """
    bits = jax.lax.iota(jnp.uint32, math.prod(shape)) + stream * jnp.uint32(0x9E3779B9)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        bits = (bits ^ (bits >> jnp.uint32(shift))) * jnp.uint32(factor)
    unit = ((bits ^ (bits >> jnp.uint32(16))) >> jnp.uint32(8)).astype(jnp.float32) * jnp.float32(2**-23) - 1
    return (unit * jnp.float32(deviation * 3**0.5)).reshape(shape).astype(dtype)


def parameters(cfg: LlamaConfig) -> int:
    """The number of parameters."""
    abstract = llama.abstract(cfg, False)
    return sum(leaf.size for leaf in jax.tree.leaves(abstract))


def weight_bytes(cfg: LlamaConfig) -> int:
    """Bytes of weights that a forward pass reads.

    An untied embedding is not counted, because only a few of its rows are read. A tied one is read as a whole by the
    unembedding.
    """
    read = parameters(cfg) - (0 if cfg.tie_embeddings else cfg.vocab_size * cfg.d_model)
    return read * np.dtype(cfg.param_dtype).itemsize


def cache_bytes(cfg: LlamaConfig, batch_size: int, length: int) -> int:
    """Bytes of keys and values that a forward pass reads: `length` committed tokens in each of `batch_size` rows."""
    return 2 * cfg.n_layers * batch_size * length * cfg.n_kv_heads * cfg.head_dim * np.dtype(cfg.dtype).itemsize
