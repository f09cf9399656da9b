"""Attention over the committed prefix and the tokens of a forward pass; axes as in `llama.py`."""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from msn_jax import cpu
from msn_jax.cache import LayerKV

NUM_QUERY_BLOCKS = 4  # in attention over a long sequence without cache
_MIN_QUERY_BLOCK = 64  # tokens
MASKED = -1e30  # finite, so that a query without keys gives an average and not NaN


class Prefix(NamedTuple):
    """The committed prefix, as one layer attends to it."""

    kv: LayerKV  # [B, K, S, H] each
    visible: Array  # bool [B, 1 or T, S]
    num_blocks: Array | None = None  # int32 []: only so many blocks of slots hold visible ones; None: read all slots


class _Sums(NamedTuple):
    """Attention to some of the keys: what a softmax over them and others needs."""

    maximum: Array  # [B, K, G, Q, 1], the largest logit
    total: Array  # [B, K, G, Q, 1], the sum of exp(logit - maximum)
    output: Array  # [B, K, G, Q, H], the values, weighted with exp(logit - maximum)


def num_committed_blocks(lengths: Array, capacity: int, tokens: int) -> Array | None:
    """`Prefix.num_blocks` of a cache with `lengths` [B] committed tokens, for a forward pass over `tokens` tokens.

    None where reading all slots is faster.
    """
    if capacity % cpu.PREFIX_BLOCK or not cpu.reads_prefix_by_blocks(capacity, tokens):
        return None
    return -(-jnp.max(lengths) // cpu.PREFIX_BLOCK)


def attend(q: Array, own: LayerKV, mask: Array, prefix: Prefix | None) -> Array:
    """Attention with one softmax over the committed prefix and the tokens of this forward.

    It combines their logits, never their keys and values, so the cache is read in place.

    A long sequence without prefix is processed in blocks of queries. No token attends to a later one (`masks.py`), so
    each block needs only the keys up to its own end, which saves three eighths of the work.

    Args:
      q: [B, T, K, G, H], rotated and scaled.
      own: keys and values of this forward, [B, K, T, H] each.
      mask: bool [B or 1, T, T].
      prefix: the committed prefix, or None.

    Returns:
      [B, T, K, G, H].
    """
    T = q.shape[1]
    if prefix is not None or T < NUM_QUERY_BLOCKS * _MIN_QUERY_BLOCK:
        return attend_masked(q, own, mask, prefix)
    ends = [T * i // NUM_QUERY_BLOCKS for i in range(NUM_QUERY_BLOCKS + 1)]
    keys, values = own
    blocks = [
        attend_masked(q[:, start:end], (keys[:, :, :end], values[:, :, :end]), mask[:, start:end, :end], None)
        for start, end in itertools.pairwise(ends)
    ]
    return jnp.concatenate(blocks, axis=1)


def attend_masked(q: Array, own: LayerKV, mask: Array, prefix: Prefix | None) -> Array:
    """`attend` for queries [B, Q, K, G, H], keys and values [B, K, T, H] and a mask [B or 1, Q, T], Q at most T."""
    q = q.transpose(0, 2, 3, 1, 4)
    if prefix is None:
        sums = _sum(q, [(own, mask)])
    elif prefix.num_blocks is None:
        sums = _sum(q, [(own, mask), (prefix.kv, prefix.visible)])
    else:
        sums = _add_blocks(q, _sum(q, [(own, mask)]), prefix)
    out = (sums.output / sums.total).astype(q.dtype)
    return out.transpose(0, 3, 1, 2, 4)


def _sum(q: Array, parts: list[tuple[LayerKV, Array]]) -> _Sums:
    """Attention of queries [B, K, G, Q, H] to keys and values [B, K, S, H], with a mask [B or 1, 1 or Q, S] each."""
    B, K, G, Q, H = q.shape
    q = q.reshape(B, K, G * Q, H)  # one product per kv head
    logits = []
    for (keys, _), mask in parts:
        product = jnp.einsum("BKQH,BKSH->BKQS", q, keys, preferred_element_type=jnp.float32)
        logits.append(jnp.where(mask[:, None, None], product.reshape(B, K, G, Q, -1), MASKED))
    maximum = functools.reduce(jnp.maximum, [part.max(axis=-1, keepdims=True) for part in logits])
    weights = [jnp.exp(part - jax.lax.stop_gradient(maximum)) for part in logits]
    total = sum(part.sum(axis=-1, keepdims=True) for part in weights)
    output = jnp.zeros((B, K, G * Q, H), jnp.float32)
    for part, ((_, values), _) in zip(weights, parts, strict=True):
        part = part.astype(q.dtype).reshape(B, K, G * Q, -1)
        output += jnp.einsum("BKQS,BKSH->BKQH", part, values, preferred_element_type=jnp.float32)
    return _Sums(maximum, total, output.reshape(B, K, G, Q, H))


def _add_blocks(q: Array, sums: _Sums, prefix: Prefix) -> _Sums:
    """`sums` with the first blocks of the prefix added, one at a time, as in FlashAttention (arXiv 2205.14135)."""

    def add_block(number: Array, sums: _Sums) -> _Sums:
        def block(slots: Array, axis: int) -> Array:
            return jax.lax.dynamic_slice_in_dim(slots, number * cpu.PREFIX_BLOCK, cpu.PREFIX_BLOCK, axis)

        new = _sum(q, [((block(prefix.kv[0], 2), block(prefix.kv[1], 2)), block(prefix.visible, 2))])
        maximum = jnp.maximum(sums.maximum, new.maximum)
        old_scale, new_scale = jnp.exp(sums.maximum - maximum), jnp.exp(new.maximum - maximum)
        total = sums.total * old_scale + new.total * new_scale
        return _Sums(maximum, total, sums.output * old_scale + new.output * new_scale)

    return jax.lax.fori_loop(0, prefix.num_blocks, add_block, sums)
