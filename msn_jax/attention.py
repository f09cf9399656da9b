"""Attention over the committed prefix and the tokens of a forward pass; axes as in `llama.py`."""

import functools
import itertools

import jax
import jax.numpy as jnp
from jax import Array

from msn_jax.cache import LayerKV

_NUM_QUERY_BLOCKS = 4  # in attention over a long sequence without cache
_MIN_QUERY_BLOCK = 64  # tokens
_MASKED = -1e30  # finite, so that a query without keys gives an average and not NaN

Prefix = tuple[LayerKV, Array]  # keys and values [B, K, S, H] of one layer, and their mask, bool [B, 1 or T, S]


def attend(q: Array, own: LayerKV, mask: Array, prefix: Prefix | None) -> Array:
    """Attention with one softmax over the committed prefix and the tokens of this forward.

    It combines their logits, never their keys and values, so the cache is read in place.

    A long sequence without prefix is processed in blocks of queries. No token attends to a later one (`masks.py`), so
    each block needs only the keys up to its own end, which saves three eighths of the work.

    Args:
      q: [B, T, K, G, H], rotated and scaled.
      own: keys and values of this forward, [B, K, T, H] each.
      mask: bool [B or 1, T, T].
      prefix: ((keys, values) [B, K, S, H], bool [B, 1 or T, S]), or None.

    Returns:
      [B, T, K, G, H].
    """
    T = q.shape[1]
    if prefix is not None or T < _NUM_QUERY_BLOCKS * _MIN_QUERY_BLOCK:
        return _attend(q, own, mask, prefix)
    ends = [T * i // _NUM_QUERY_BLOCKS for i in range(_NUM_QUERY_BLOCKS + 1)]
    keys, values = own
    blocks = [
        _attend(q[:, start:end], (keys[:, :, :end], values[:, :, :end]), mask[:, start:end, :end], None)
        for start, end in itertools.pairwise(ends)
    ]
    return jnp.concatenate(blocks, axis=1)


def _attend(q: Array, own: LayerKV, mask: Array, prefix: Prefix | None) -> Array:
    """`attend` for queries [B, Q, K, G, H], keys and values [B, K, T, H] and a mask [B or 1, Q, T], Q at most T."""
    B, Q, K, G, H = q.shape
    own_k, own_v = own
    q = q.transpose(0, 2, 3, 1, 4).reshape(B, K, G * Q, H)  # one product per kv head

    def attention_logits(keys: Array) -> Array:
        return jnp.einsum("BKQH,BKSH->BKQS", q, keys, preferred_element_type=jnp.float32).reshape(B, K, G, Q, -1)

    logits = [jnp.where(mask[:, None, None], attention_logits(own_k), _MASKED)]
    values = [own_v]
    if prefix is not None:
        (prefix_k, prefix_v), visible = prefix
        logits.append(jnp.where(visible[:, None, None], attention_logits(prefix_k), _MASKED))
        values.append(prefix_v)
    maximum = functools.reduce(jnp.maximum, [part.max(axis=-1, keepdims=True) for part in logits])
    weights = [jnp.exp(part - jax.lax.stop_gradient(maximum)) for part in logits]
    total = sum(part.sum(axis=-1) for part in weights).reshape(B, K, G * Q, 1)
    out = jnp.zeros((B, K, G * Q, H), jnp.float32)
    for part, v in zip(weights, values, strict=True):
        part = part.astype(q.dtype).reshape(B, K, G * Q, -1)
        out += jnp.einsum("BKQS,BKSH->BKQH", part, v, preferred_element_type=jnp.float32)
    out = (out / total).astype(q.dtype)
    return out.reshape(B, K, G, Q, H).transpose(0, 3, 1, 2, 4)
