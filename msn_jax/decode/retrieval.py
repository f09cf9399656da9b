"""Retrieval: what followed the last time the text ended like this.

The longest match wins, and among equals the most recent one (SAM-Decoding, arXiv 2411.10666, finds both to matter;
prompt lookup and the paper's own code take the oldest match of a fixed n-gram).
"""

import jax
import jax.numpy as jnp
from jax import Array

from msn_jax.decode.tree import LONGEST_MATCH


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

    padded = jnp.concatenate([jnp.full((LONGEST_MATCH,), -1, tokens.dtype), tokens])
    suffix = padded[newest + LONGEST_MATCH - jnp.arange(LONGEST_MATCH, dtype=jnp.int32)]  # the newest token first
    matched = jnp.zeros((slots,), jnp.int32)  # length of the common suffix of tokens[:j + 1] and the text
    alive = index < newest
    for back in range(LONGEST_MATCH):
        start = LONGEST_MATCH - back
        alive &= padded[start : start + slots] == suffix[back]
        matched += alive.astype(jnp.int32)

    # Match and place in one number: XLA finds the largest of many much faster than where it is.
    score = jnp.where(matched > 0, matched * slots + index, -1)
    following = jnp.concatenate([tokens[1:], jnp.full((1,), -1, tokens.dtype)])
    found, agreement = [], []
    for _ in range(branches):
        best = jnp.max(score)
        match, place = jnp.divmod(jnp.maximum(best, 0), slots)
        period = newest - place
        steps = place + 1 + jnp.arange(depth, dtype=jnp.int32) % jnp.maximum(period, 1)
        found.append(jnp.where(best >= 0, tokens[steps], -1))
        agreement.append(match)
        score = jnp.where(following == tokens[place + 1], -1, score)
    return jnp.stack(found), jnp.stack(agreement)


def retrieve_batch(tokens: Array, lengths: Array, branches: int, depth: int) -> tuple[Array, Array]:
    """`retrieve` for every row: tokens [B, S], lengths [B] -> int32 [B, branches, depth] and [B, branches]."""
    return jax.vmap(lambda row, length: retrieve(row, length, branches, depth))(tokens, lengths)
