"""Retrieval: what followed the last time the text ended like this.

The longest match wins, and among equals the most recent one (SAM-Decoding, arXiv 2411.10666, finds both to matter;
prompt lookup and the paper's own code take the oldest match of a fixed n-gram).
"""

import jax
import jax.numpy as jnp
from jax import Array

LONGEST_MATCH = 16  # tokens of the suffix that are compared


def retrieve(tokens: Array, length: Array, branches: int, depth: int) -> tuple[Array, Array]:
    """Continuations of the current suffix, found in the text itself.

    Args:
      tokens: int32 [S], one row's text.
      length: int32 [], valid tokens.
      branches: how many continuations; they differ in their first token.
      depth: tokens per continuation. One that reaches the end of the text goes on periodically.

    Returns:
      int32 [branches, depth], -1 where nothing matches; and int32 [branches], how many tokens of the suffix do, at most
      `LONGEST_MATCH`.
    """
    slots = tokens.shape[0]
    index = jnp.arange(slots, dtype=jnp.int32)
    newest = length - 1

    matched = jnp.zeros((slots,), jnp.int32)  # length of the common suffix of tokens[:j + 1] and the text
    alive = index < newest
    for back in range(min(LONGEST_MATCH, slots)):
        shifted = jnp.concatenate([jnp.full((back,), -1, tokens.dtype), tokens[: slots - back]])
        alive &= (shifted == tokens[jnp.maximum(newest - back, 0)]) & (newest >= back)
        matched += alive.astype(jnp.int32)

    score = jnp.where(matched > 0, matched * slots + index, -1)
    following = jnp.concatenate([tokens[1:], jnp.full((1,), -1, tokens.dtype)])
    found, agreement = [], []
    for _ in range(branches):
        best = jnp.argmax(score).astype(jnp.int32)
        period = newest - best
        steps = best + 1 + jnp.arange(depth, dtype=jnp.int32) % jnp.maximum(period, 1)
        found.append(jnp.where(score[best] >= 0, tokens[steps], -1))
        agreement.append(jnp.where(score[best] >= 0, matched[best], 0))
        score = jnp.where(following == tokens[best + 1], -1, score)
    return jnp.stack(found), jnp.stack(agreement)


def retrieve_batch(tokens: Array, lengths: Array, branches: int, depth: int) -> tuple[Array, Array]:
    """`retrieve` for every row: tokens [B, S], lengths [B] -> int32 [B, branches, depth] and [B, branches]."""
    return jax.vmap(lambda row, length: retrieve(row, length, branches, depth))(tokens, lengths)
