"""The key-value cache: what the model remembers of the committed text.

`forward` reads it and never writes it; `commit` is the only writer and runs once per step, after verification, on
the accepted nodes alone. A rejected draft therefore never reaches the cache, and there is nothing to roll back.

Layout: one [B, K, S, H] array per layer. Slot s of row b holds the token at position s; slots at and beyond
`lengths[b]` hold leftovers that no query may see.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from msn_jax.config import LlamaConfig

LayerKV = tuple[Array, Array]  # keys and values of one layer, [B, K, T or S, H] each


@struct.dataclass
class KVCache:
    """Committed keys and values, and how many of them are valid."""

    layers: tuple[LayerKV, ...]  # one pair per layer
    lengths: Array  # int32 [B], committed tokens

    @property
    def capacity(self) -> int:
        """S: slots per row."""
        return self.layers[0][0].shape[2]


def create(cfg: LlamaConfig, batch_size: int, capacity: int) -> KVCache:
    """An empty cache of `capacity` slots per row, in the model's compute dtype."""
    shape = (batch_size, cfg.n_kv_heads, capacity, cfg.head_dim)
    layers = tuple((jnp.zeros(shape, cfg.dtype), jnp.zeros(shape, cfg.dtype)) for _ in range(cfg.n_layers))
    return KVCache(layers, jnp.zeros((batch_size,), jnp.int32))


def commit(cache: KVCache, new_kv: tuple[LayerKV, ...], path: Array, count: Array) -> KVCache:
    """Appends the tokens `path[b, :count[b]]` of the last forward to row b.

    Args:
      cache: the cache that forward attended to.
      new_kv: forward's keys and values, [B, K, T, H] per layer.
      path: int32 [B, P], indices into T. Entries from `count` on are written too, but stay beyond `lengths`.
      count: int32 [B], accepted tokens. The caller keeps `lengths + P <= S` for every row.
    """

    def append_row(slots: Array, new: Array, nodes: Array, start: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(slots, new[:, nodes], start, axis=1)

    append = jax.vmap(append_row)
    layers = tuple(
        (append(k, new_k, path, cache.lengths), append(v, new_v, path, cache.lengths))
        for (k, v), (new_k, new_v) in zip(cache.layers, new_kv, strict=True)
    )
    return KVCache(layers, cache.lengths + count)


def grow(cache: KVCache, capacity: int) -> KVCache:
    """The same cache with room for `capacity` slots per row."""
    extra = ((0, 0), (0, 0), (0, capacity - cache.capacity), (0, 0))
    return cache.replace(layers=jax.tree.map(lambda slots: jnp.pad(slots, extra), cache.layers))
