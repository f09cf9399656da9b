"""The key-value cache of the committed prefix.

`forward` reads it and never writes it. `commit` is the only writer: it runs once per step, after verification, on the
accepted nodes alone. A rejected draft never reaches the cache, so there is nothing to roll back.

Layout: one [B, K, S, H] array for keys and one for values per layer. Slot s of row b holds the token at position s;
slots at and beyond `lengths[b]` hold stale values that no query attends to.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array
from jax.sharding import Mesh

from msn_jax import cpu, sharding
from msn_jax.config import LlamaConfig

AXES = ("batch", "kv_heads", "slots", "head_dim")  # of keys and of values

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
    """An empty cache of `capacity` slots per row in the compute dtype, sharded by rows and heads if there is a mesh."""
    shape = (batch_size, cfg.n_kv_heads, capacity, cfg.head_dim)

    layers = tuple((jnp.zeros(shape, cfg.dtype), jnp.zeros(shape, cfg.dtype)) for _ in range(cfg.n_layers))
    cache = KVCache(layers, jnp.zeros((batch_size,), jnp.int32))
    return cache if mesh is None else constrain(cache, mesh)


def constrain(cache: KVCache, mesh: Mesh) -> KVCache:
    """Inside jit: the cache sharded by rows and heads."""
    layers = jax.tree.map(lambda slots: sharding.constrain(slots, AXES, mesh, sharding.DECODE_RULES), cache.layers)
    return KVCache(layers, sharding.constrain(cache.lengths, AXES[:1], mesh, sharding.DECODE_RULES))


def commit(cache: KVCache, new_kv: tuple[LayerKV, ...], path: Array, count: Array) -> KVCache:
    """Appends the tokens `path[b, :count[b]]` of the last forward pass to row b.

    Args:
      cache: the cache that the forward pass attended to.
      new_kv: its keys and values, [B, K, T, H] per layer.
      path: int32 [B, P], indices into T. Entries from `count` on are written too, but stay beyond `lengths`.
      count: int32 [B], accepted tokens. The caller keeps `lengths + P <= S` for every row.
    """

    def append_row(slots: Array, new: Array, nodes: Array, start: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(slots, new[:, nodes], start, axis=1)

    append = jax.vmap(append_row)
    # XLA writes in place only if the write position depends on the verification. Where it is known before (a tree of
    # the root alone), XLA copies the whole cache in every forward pass.
    start = cpu.order_after(count, cache.lengths)
    written: list[Array] = []
    for slots, new in zip(jax.tree.leaves(cache.layers), jax.tree.leaves(new_kv), strict=True):
        start = cpu.order_writes(written, start)
        written.append(append(slots, new, path, start))
    layers = jax.tree.unflatten(jax.tree.structure(cache.layers), written)
    return KVCache(layers, cache.lengths + count)


def resize(cache: KVCache, capacity: int) -> KVCache:
    """The same cache with more or fewer slots per row; the committed tokens must fit."""
    extra = ((0, 0), (0, 0), (0, max(capacity - cache.capacity, 0)), (0, 0))
    return cache.replace(layers=jax.tree.map(lambda slots: jnp.pad(slots[:, :, :capacity], extra), cache.layers))
