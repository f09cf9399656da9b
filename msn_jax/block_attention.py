"""Attention of noise blocks (`gated.py`): every block attends to the row and to itself, never to another block.

`attention.attend` would multiply the queries of all E block tokens with the keys of all E, and a block of L tokens uses
only L of them. Here the products of a block with itself are a batch of small ones, which costs E L instead of E^2.
"""

import jax
import jax.numpy as jnp
from jax import Array

from msn_jax.attention import MASKED, Prefix
from msn_jax.cache import LayerKV


def attend_blocks(q: Array, own: LayerKV, mask: Array, prefix: Prefix) -> Array:
    """Attention with one softmax over the row and the query's block; axes as in `llama.py`.

    Args:
      q: [B, E, K, G, H], rotated and scaled; M blocks of L tokens, E = M L.
      own: keys and values of the blocks, [B, K, E, H] each.
      mask: bool [B or 1, L, L], within a block; the same for all blocks.
      prefix: keys and values [B, K, S, H] of the row, and their mask, bool [B, E, S].

    Returns:
      [B, E, K, G, H].
    """
    B, E, K, G, H = q.shape
    L = mask.shape[-1]
    blocks = (E // L, L)
    row_k, row_v = prefix.kv
    own_k, own_v = (part.reshape(B, K, *blocks, H) for part in own)
    q = q.transpose(0, 2, 3, 1, 4)

    def multiply(equation: str, *operands: Array) -> Array:
        return jnp.einsum(equation, *operands, preferred_element_type=jnp.float32)

    to_row = multiply("BKQH,BKSH->BKQS", q.reshape(B, K, G * E, H), row_k).reshape(B, K, G, E, -1)
    to_row = jnp.where(prefix.visible[:, None, None], to_row, MASKED)
    to_own = multiply("BKGMQH,BKMSH->BKGMQS", q.reshape(B, K, G, *blocks, H), own_k)
    to_own = jnp.where(mask[:, None, None, None], to_own, MASKED).reshape(B, K, G, E, L)
    maximum = jnp.maximum(to_row.max(axis=-1, keepdims=True), to_own.max(axis=-1, keepdims=True))
    to_row, to_own = (jnp.exp(part - jax.lax.stop_gradient(maximum)) for part in (to_row, to_own))
    total = to_row.sum(axis=-1, keepdims=True) + to_own.sum(axis=-1, keepdims=True)
    from_row = multiply("BKQS,BKSH->BKQH", to_row.astype(q.dtype).reshape(B, K, G * E, -1), row_v)
    from_own = multiply("BKGMQS,BKMSH->BKGMQH", to_own.astype(q.dtype).reshape(B, K, G, *blocks, L), own_v)
    out = from_row.reshape(B, K, G, E, H) + from_own.reshape(B, K, G, E, H)
    return (out / total).astype(q.dtype).transpose(0, 3, 1, 2, 4)
