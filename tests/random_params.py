"""Random parameters for tests, including the norm scales and the output projections that `init` sets to 1 and 0."""

import functools

import jax
import numpy as np
from flax.core import meta
from jax import numpy as jnp

from msn_jax import llama
from msn_jax.config import LlamaConfig


@functools.lru_cache
def stacked(cfg: LlamaConfig, seed: int = 0, gain: float = 1.0) -> dict:
    """Training layout. Matrices have a standard deviation of `gain / sqrt(fan in)`."""
    rng = np.random.default_rng(seed)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        noise = rng.normal(size=leaf.shape)
        name = path[-1].key
        if name == "scale":
            return jnp.asarray(1 + 0.3 * noise, leaf.dtype)
        if name in ("embed", "unembed"):
            return jnp.asarray(noise * 0.1, leaf.dtype)
        fan_in = cfg.n_heads * cfg.head_dim if name == "o" else leaf.shape[1]
        return jnp.asarray(noise * gain * fan_in**-0.5, leaf.dtype)

    shapes = meta.unbox(jax.eval_shape(lambda: llama.init(jax.random.key(0), cfg)))
    return jax.tree_util.tree_map_with_path(draw, shapes)


@functools.lru_cache
def unstacked(cfg: LlamaConfig, seed: int = 0, gain: float = 1.0) -> dict:
    """The same parameters in decoding layout."""
    return llama.unstack_layers(stacked(cfg, seed, gain), cfg)
