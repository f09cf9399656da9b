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
from jax.sharding import Mesh

from msn_jax import sharding
from msn_jax.config import LlamaConfig

_AXES = ("batch", "kv_heads", "slots", "head_dim")
# Writes that wait for nothing but verification. Of more than these XLA's runtime for CPUs hands half to other threads,
# which takes longer than to write a few tokens: up to a third of a small model's pass.
_AT_ONCE = 8

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


def create(cfg: LlamaConfig, batch_size: int, capacity: int, mesh: Mesh | None = None) -> KVCache:
    """An empty cache of `capacity` slots per row, in the model's compute dtype; on a mesh, rows and heads are split."""
    shape = (batch_size, cfg.n_kv_heads, capacity, cfg.head_dim)

    def empty() -> Array:
        slots = jnp.zeros(shape, cfg.dtype)
        return slots if mesh is None else sharding.constrain(slots, _AXES, mesh, sharding.DECODE_RULES)

    layers = tuple((empty(), empty()) for _ in range(cfg.n_layers))
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
    # A write that waits for verification is done in place, while one whose place is known before (that of a tree of one
    # node) makes XLA copy the whole cache in every pass.
    start = _after(count, cache.lengths)
    written = []
    for slots, new in zip(jax.tree.leaves(cache.layers), jax.tree.leaves(new_kv), strict=True):
        if written and len(written) % _AT_ONCE == 0 and jax.default_backend() == "cpu":
            start = _after(written[-1][:, 0, 0, 0] == 0, start)  # whatever was written there, NaN included: 0 or 1
        written.append(append(slots, new, path, start))
    layers = jax.tree.unflatten(jax.tree.structure(cache.layers), written)
    return KVCache(layers, cache.lengths + count)


def _after(done: Array, start: Array) -> Array:
    """`start`, int32 [B], once `done`, at least 0, is there: what is added is 0, but XLA does not know."""
    return start + jnp.minimum(done.astype(jnp.int32), 0)


def resize(cache: KVCache, capacity: int) -> KVCache:
    """The same cache with `capacity` slots per row, more or fewer; the texts fit into them."""
    extra = ((0, 0), (0, 0), (0, max(capacity - cache.capacity, 0)), (0, 0))
    return cache.replace(layers=jax.tree.map(lambda slots: jnp.pad(slots[:, :, :capacity], extra), cache.layers))
