"""Who may look at whom: boolean masks over the tokens of one forward pass, [B, T, T] or [1, T, T].

Entry [b, i, j] is True where query i may attend to key j. The committed prefix (the cache) is not part of these
masks: every query sees all of it (`committed`). A model with a sliding window narrows both kinds (`window`).

    causal, T = 4        segments [1 1 2 2]      tree, parents [-1 0 0 1]
    x . . .              x . . .                 x . . .      0 the root
    x x . .              x x . .                 x x . .      1 child of 0
    x x x .              . . x .                 x . x .      2 child of 0
    x x x x              . . x x                 x x . x      3 child of 1

    blocks of 2 beside a text of 4, segments [1 1 1 1], starts [2 1]
    x . . .  . . . .     the text sees itself alone
    x x . .  . . . .
    x x x .  . . . .
    x x x x  . . . .
    x x . .  x . . .     the block that stands for the places 2 and 3
    x x . .  x x . .
    x . . .  . . x .     the block that stands for the places 1 and 2
    x . . .  . . x x

    causal in a window of 2, positions 0 1 2 3       the tree in a window of 2, positions 5 6 6 7
    x . . .                                          x . . .
    x x . .                                          x x . .
    . x x .                                          x . x .
    . . x x                                          . x . x
"""

import jax.numpy as jnp
import numpy as np
from jax import Array


def causal(length: int) -> Array:
    """[1, T, T]: every token sees itself and what lies before it."""
    return jnp.tril(jnp.ones((1, length, length), bool))


def segments(segment_ids: Array) -> Array:
    """[B, T, T]: causal within each sample of a packed row.

    Padding (segment 0) is a segment of its own, so that no query is left without a key.
    """
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    return same & causal(segment_ids.shape[1])


def blocks(segment_ids: Array, starts: Array, length: int) -> Array:
    """[B, T + E, T + E]: `segments` for the text, and M blocks of `length` tokens beside it, E = M * length.

    A block sees the text of its sample before its start, and itself. Nobody else sees it.

    Args:
      segment_ids: int32 [B, T].
      starts: int32 [B, M], the place in the text that the first token of each block stands for.
      length: L.
    """
    B, T = segment_ids.shape
    E = starts.shape[1] * length
    owner = jnp.arange(E)[None, :] // length
    own = jnp.broadcast_to((owner[:, :, None] == owner[:, None, :]) & causal(E), (B, E, E))
    begin = jnp.repeat(starts, length, axis=1)
    sample = jnp.take_along_axis(segment_ids, begin, axis=1)
    text = (segment_ids[:, None, :] == sample[:, :, None]) & (jnp.arange(T)[None, None, :] < begin[:, :, None])
    above = jnp.concatenate([segments(segment_ids), jnp.zeros((B, T, E), bool)], axis=2)
    return jnp.concatenate([above, jnp.concatenate([text, own], axis=2)], axis=1)


def tree(parents: tuple[int, ...]) -> np.ndarray:
    """[1, W, W]: every node sees its ancestors and itself. `parents[0]` is -1, others are smaller than their index."""
    mask = np.eye(len(parents), dtype=bool)
    for node, parent in enumerate(parents):
        if parent >= 0:
            mask[node] |= mask[parent]
    return mask[None]


def committed(lengths: Array, capacity: int) -> Array:
    """[B, 1, S]: every query of a row sees the slots in use."""
    return jnp.arange(capacity)[None, None, :] < lengths[:, None, None]


def window(mask: Array, query_positions: Array, key_positions: Array, size: int) -> Array:
    """What is left of `mask` in a sliding window (Mistral 7B, arXiv 2310.06825): distances below `size`.

    The distance is that of the positions, because the nodes of a token tree share one position per depth.

    Args:
      mask: bool [B or 1, T or 1, S].
      query_positions: int32 [B, T].
      key_positions: int32 [B or 1, S].
      size: in tokens, the query itself included.

    Returns:
      bool [B, T, S].
    """
    return mask & (query_positions[:, :, None] - key_positions[:, None, :] < size)
