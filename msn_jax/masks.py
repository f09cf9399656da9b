"""Attention masks: boolean, over the tokens of one forward pass, [B, T, T] or [1, T, T].

Entry [b, i, j] is True where query i attends to key j. The committed prefix (the cache) has its own mask
(`committed`): every query attends to all of it. A sliding window narrows both (`window`).

    causal, T = 4        segments [1 1 2 2]      tree, parents [-1 0 0 1]
    x . . .              x . . .                 x . . .      0 the root
    x x . .              x x . .                 x x . .      1 child of 0
    x x x .              . . x .                 x . x .      2 child of 0
    x x x x              . . x x                 x x . x      3 child of 1

    noise blocks of 2 tokens appended to a row of 4, segments [1 1 1 1], starts [2 1]
    x . . .  . . . .     the row attends to itself alone
    x x . .  . . . .
    x x x .  . . . .
    x x x x  . . . .
    x x . .  x . . .     the block for positions 2 and 3
    x x . .  x x . .
    x . . .  . . x .     the block for positions 1 and 2
    x . . .  . . x x

    causal in a window of 2, positions 0 1 2 3       the tree in a window of 2, positions 5 6 6 7
    x . . .                                          x . . .
    x x . .                                          x x . .
    . x x .                                          x . x .
    . . x x                                          . x . x
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array


class Packed(NamedTuple):
    """The mask `packed`, before it is an array: long rows never make it one (`packed_attention.py`)."""

    segment_ids: Array  # int32 [B, T]


Mask = Array | Packed


def causal(length: int) -> Array:
    """[1, T, T]: every token attends to itself and the tokens before it."""
    return jnp.tril(jnp.ones((1, length, length), bool))


def packed(segment_ids: Array) -> Array:
    """[B, T, T]: causal within each sample of a packed row.

    Padding (segment 0) is a segment of its own, so that every query has a key.
    """
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    return same & causal(segment_ids.shape[1])


def blocks(segment_ids: Array, starts: Array, length: int) -> Array:
    """[B, T + E, T + E]: `packed` for the row, and M appended blocks of `length` tokens, E = M * length.

    A block attends to its sample's tokens before its start, and to itself. Nothing else attends to it.

    Args:
      segment_ids: int32 [B, T].
      starts: int32 [B, M], the row position of each block's first token.
      length: L.
    """
    B, T = segment_ids.shape
    E = starts.shape[1] * length
    to_block = jnp.broadcast_to(within_blocks(E, length), (B, E, E))
    of_row = jnp.concatenate([packed(segment_ids), jnp.zeros((B, T, E), bool)], axis=2)
    of_blocks = jnp.concatenate([blocks_to_row(segment_ids, starts, length), to_block], axis=2)
    return jnp.concatenate([of_row, of_blocks], axis=1)


def within_blocks(count: int, length: int) -> Array:
    """[1, E, E]: causal within each block of `length` tokens; E is `count`."""
    block = jnp.arange(count)[None, :] // length
    return (block[:, :, None] == block[:, None, :]) & causal(count)


def blocks_to_row(segment_ids: Array, starts: Array, length: int) -> Array:
    """[B, E, T]: the part of `blocks` where a block attends to its sample's tokens before its start."""
    start = jnp.repeat(starts, length, axis=1)
    sample = jnp.take_along_axis(segment_ids, start, axis=1)
    index = jnp.arange(segment_ids.shape[1])[None, None, :]
    return (segment_ids[:, None, :] == sample[:, :, None]) & (index < start[:, :, None])


def tree(parents: tuple[int, ...]) -> np.ndarray:
    """[1, W, W]: every node attends to its ancestors and itself. `parents[0]` is -1; a parent precedes its children."""
    mask = np.eye(len(parents), dtype=bool)
    for node, parent in enumerate(parents):
        if parent >= 0:
            mask[node] |= mask[parent]
    return mask[None]


def committed(lengths: Array, capacity: int) -> Array:
    """[B, 1, S]: every query of a row attends to its committed slots."""
    return jnp.arange(capacity)[None, None, :] < lengths[:, None, None]


def window(mask: Array, query_positions: Array, key_positions: Array, size: int) -> Array:
    """`mask` restricted to a sliding window (Mistral 7B, arXiv 2310.06825): distances below `size`.

    Distances are between positions, because nodes of a token tree at the same depth share one position.

    Args:
      mask: bool [B or 1, T or 1, S].
      query_positions: int32 [B, T].
      key_positions: int32 [B or 1, S].
      size: in tokens, the query itself included.

    Returns:
      bool [B, T, S].
    """
    return mask & (query_positions[:, :, None] - key_positions[:, None, :] < size)
