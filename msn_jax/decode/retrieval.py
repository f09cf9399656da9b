"""Retrieval: continuations of earlier occurrences of the sequence's current suffix, in prompt and output.

The longest match wins, and among equal matches the most recent one. SAM-Decoding (arXiv 2411.10666) finds both to
matter; prompt lookup and the paper's own code take the oldest match of a fixed n-gram.
"""

import jax
import jax.numpy as jnp
from jax import Array

from msn_jax.decode.tree import LONGEST_MATCH


def retrieve(tokens: Array, length: Array, branches: int, depth: int) -> tuple[Array, Array]:
    """Retrieves continuations of the current suffix from the sequence itself.

    Args:
      tokens: int32 [S], one row's sequence.
      length: int32 [], valid tokens.
      branches: number of continuations; they differ in their first token.
      depth: tokens per continuation. One that reaches the end of the sequence continues periodically.

    Returns:
      Continuations int32 [branches, depth], -1 where nothing matches; and match lengths int32 [branches], the matching
      tokens of the suffix, at most `LONGEST_MATCH`.
    """
    slots = tokens.shape[0]
    index = jnp.arange(slots, dtype=jnp.int32)
    newest = length - 1

    padded = jnp.concatenate([jnp.full((LONGEST_MATCH,), -1, tokens.dtype), tokens])
    suffix = padded[newest + LONGEST_MATCH - jnp.arange(LONGEST_MATCH, dtype=jnp.int32)]  # newest token first
    matched = jnp.zeros((slots,), jnp.int32)  # length of the common suffix of tokens[:j + 1] and the sequence
    still_matches = index < newest
    for back in range(LONGEST_MATCH):
        start = LONGEST_MATCH - back
        still_matches &= padded[start : start + slots] == suffix[back]
        matched += still_matches.astype(jnp.int32)

    # Match length and position in one number, because XLA computes a maximum much faster than an argmax.
    score = jnp.where(matched > 0, matched * slots + index, -1)
    following = jnp.concatenate([tokens[1:], jnp.full((1,), -1, tokens.dtype)])
    retrieved, match_lengths = [], []
    for _ in range(branches):
        best = jnp.max(score)
        match_length, position = jnp.divmod(jnp.maximum(best, 0), slots)
        period = newest - position
        steps = position + 1 + jnp.arange(depth, dtype=jnp.int32) % jnp.maximum(period, 1)
        retrieved.append(jnp.where(best >= 0, tokens[steps], -1))
        match_lengths.append(match_length)
        score = jnp.where(following == tokens[position + 1], -1, score)
    return jnp.stack(retrieved), jnp.stack(match_lengths)


def retrieve_batch(tokens: Array, lengths: Array, branches: int, depth: int) -> tuple[Array, Array]:
    """`retrieve` for every row: tokens [B, S], lengths [B] -> int32 [B, branches, depth] and [B, branches]."""
    return jax.vmap(lambda row, length: retrieve(row, length, branches, depth))(tokens, lengths)
