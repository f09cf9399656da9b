"""Reading prompts: what is known before decoding begins goes into the cache, a chunk at a time."""

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from msn_jax import cache as caches
from msn_jax import llama, masks
from msn_jax.cache import KVCache
from msn_jax.config import LlamaConfig


@struct.dataclass
class Prompt:
    """Texts to go on from, as a drafter sees them."""

    tokens: Array  # int32 [B, S], padded on the right
    lengths: Array  # int32 [B], at least 1
    chunk: int = struct.field(pytree_node=False)  # tokens read at a time; divides S


def read(params: dict, cfg: LlamaConfig, tokens: Array, lengths: Array, cache: KVCache, chunk: int) -> KVCache:
    """The cache with everything of the texts but their last tokens.

    As many chunks are read as the longest text needs, so that padding costs next to nothing and the scores of a long
    prompt never exist at once.

    Args:
      params: decoding layout.
      cfg: the model.
      tokens: int32 [B, S], padded on the right.
      lengths: int32 [B], at least 1.
      cache: of S slots: empty, or with the beginning of each text, cut to a multiple of `chunk` and shorter than it.
      chunk: tokens read at a time; divides S.
    """
    if tokens.shape[1] % chunk:
        raise ValueError(f"chunks of {chunk} tokens do not divide a capacity of {tokens.shape[1]}")
    known = cache.lengths

    def read_chunk(number: Array, cache: KVCache) -> KVCache:
        start = number * chunk
        part = jax.lax.dynamic_slice_in_dim(tokens, start, chunk, axis=1)
        index = jnp.broadcast_to(jnp.arange(chunk, dtype=jnp.int32)[None, :], part.shape)
        output = llama.forward(params, cfg, part, start + index, masks.causal(chunk), cache)
        new = jnp.where(start >= known, jnp.clip(lengths - 1 - start, 0, chunk), 0)
        return caches.commit(cache, output.kv, index, new)

    first = jnp.min(known) // chunk
    last = (jnp.max(lengths) - 2) // chunk + 1  # behind the chunk with the token before the newest
    return jax.lax.fori_loop(first, last, read_chunk, cache)
