"""Who may look at whom: boolean masks over the tokens of one forward pass, [B, T, T] or [1, T, T].

Entry [b, i, j] is True where query i may attend to key j. The committed prefix (the cache) is not part of these
masks: every query sees all of it, and `llama.py` adds that from the cache's lengths.

    causal, T = 4        segments [1 1 2 2]      tree, parents [-1 0 0 1]
    x . . .              x . . .                 x . . .      0 the root
    x x . .              x x . .                 x x . .      1 child of 0
    x x x .              . . x .                 x . x .      2 child of 0
    x x x x              . . x x                 x x . x      3 child of 1
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


def tree(parents: tuple[int, ...]) -> np.ndarray:
    """[1, W, W]: every node sees its ancestors and itself. `parents[0]` is -1, others are smaller than their index."""
    mask = np.eye(len(parents), dtype=bool)
    for node, parent in enumerate(parents):
        if parent >= 0:
            mask[node] |= mask[parent]
    return mask[None]
