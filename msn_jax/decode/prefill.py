"""Prefill: writes prompts into the cache, one chunk of tokens per forward pass."""

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from msn_jax import cache as caches
from msn_jax import llama, masks
from msn_jax.cache import KVCache
from msn_jax.config import LlamaConfig


@struct.dataclass
class PromptBatch:
    """Encoded prompts, as a drafter's `init` receives them."""

    tokens: Array  # int32 [B, S], padded on the right
    lengths: Array  # int32 [B], at least 1
    chunk: int = struct.field(pytree_node=False)  # tokens per forward pass; divides S


def fill_cache(params: dict, cfg: LlamaConfig, tokens: Array, lengths: Array, cache: KVCache, chunk: int) -> KVCache:
    """Commits all tokens of each prompt but the last.

    The number of chunks follows the longest prompt, so padding costs little, and the attention scores of a long prompt
    never exist all together.

    Args:
      params: decoding layout.
      cfg: the model.
      tokens: int32 [B, S], padded on the right.
      lengths: int32 [B], at least 1.
      cache: S slots per row: empty, or with a committed prefix of each prompt, truncated to a multiple of `chunk` and
        shorter than the prompt.
      chunk: tokens per forward pass; divides S.
    """
    if tokens.shape[1] % chunk:
        raise ValueError(f"chunks of {chunk} tokens do not divide a capacity of {tokens.shape[1]}")
    committed = cache.lengths

    def fill_chunk(number: Array, cache: KVCache) -> KVCache:
        start = number * chunk
        part = jax.lax.dynamic_slice_in_dim(tokens, start, chunk, axis=1)
        index = jnp.broadcast_to(jnp.arange(chunk, dtype=jnp.int32)[None, :], part.shape)
        output = llama.forward(params, cfg, part, start + index, masks.causal(chunk), cache)
        count = jnp.where(start >= committed, jnp.clip(lengths - 1 - start, 0, chunk), 0)
        return caches.commit(cache, output.kv, index, count)

    first = jnp.min(committed) // chunk
    end = (jnp.max(lengths) - 2) // chunk + 1  # one past the chunk that holds the last token to commit
    return jax.lax.fori_loop(first, end, fill_chunk, cache)
