"""Verification: which guesses of a tree the model itself would have made.

The rule, in full: a node is accepted if its token is the model's choice at its parent, and its parent is accepted.
The root is always accepted. The deepest accepted node wins, and the model's choice there is emitted as well (the
bonus token), so every pass emits at least one token. Nothing that is not a node is ever compared.

"The model's choice" is the best token, or a sample. The random bits of a sample depend on the request's own key and the
absolute position alone, so a sampled text, too, is the same for every drafter and tree.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from msn_jax.decode.tree import TokenTree


@struct.dataclass
class Verified:
    """The outcome of one pass for every row."""

    path: Array  # int32 [B, P + 1], nodes from the root to `last`; entries from `count` on are fillers
    last: Array  # int32 [B], the deepest accepted node
    emitted: Array  # int32 [B, P + 1], new tokens; entries from `count` on are meaningless
    count: Array  # int32 [B], tokens emitted: accepted guesses + 1, before any cut


@struct.dataclass
class Sampler:
    """How the choices of every row are made."""

    temperature: Array  # float32 [B], 0 takes the best token
    keys: Array  # PRNG keys [B], one per request


def choose(logits: Array, positions: Array, sampler: Sampler) -> Array:
    """The model's next token after every node: int32 [B, W], from logits float32 [B, W, V].

    Samples by the Gumbel-max trick: argmax(logits / temperature + g), with g drawn for the position of the node.
    Nodes at the same position share g, whichever path leads to them.

    Args:
      logits: float32 [B, W, V].
      positions: int32 [B, W], absolute, of the nodes.
      sampler: temperatures and keys.
    """
    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def sample(logits: Array) -> Array:
        def gumbel(key: Array, position: Array) -> Array:
            return jax.random.gumbel(jax.random.fold_in(key, position), logits.shape[-1:], jnp.float32)

        noise = jax.vmap(jax.vmap(gumbel, (None, 0)))(sampler.keys, positions)
        temperature = sampler.temperature[:, None, None]
        sampled = jnp.argmax(logits / jnp.where(temperature > 0, temperature, 1) + noise, axis=-1).astype(jnp.int32)
        return jnp.where(sampler.temperature[:, None] > 0, sampled, best)

    return jax.lax.cond(jnp.any(sampler.temperature > 0), sample, lambda _: best, logits)


def verify(tree: TokenTree, node_tokens: Array, choices: Array) -> Verified:
    """Accepts the longest path of right guesses.

    Args:
      tree: the static tree.
      node_tokens: int32 [B, W], the guesses.
      choices: int32 [B, W], the model's own next token after each node.
    """
    parents = np.maximum(tree.parents, 0)
    right = node_tokens == choices[:, parents]
    right = right.at[:, 0].set(True)
    path_is_right = jnp.all(right[:, None, :] | ~jnp.asarray(tree.mask), axis=-1)
    last = jnp.argmax(jnp.where(path_is_right, jnp.asarray(tree.depth)[None, :], -1), axis=-1).astype(jnp.int32)
    path = jnp.asarray(tree.paths)[last]
    emitted = jnp.take_along_axis(choices, path, axis=1)
    return Verified(path, last, emitted, jnp.asarray(tree.depth)[last] + 1)


def cut(verified: Verified, is_stop: Array, room: Array) -> Verified:
    """Ends the emitted tokens behind the first stop token and at the request's limit.

    Args:
      verified: outcome of `verify`.
      is_stop: bool [B, P + 1], emitted tokens that end the text (they are kept).
      room: int32 [B], tokens the row may still emit; 0 for a finished row.
    """
    steps = jnp.arange(1, is_stop.shape[1] + 1, dtype=jnp.int32)
    first_stop = jnp.min(jnp.where(is_stop, steps[None, :], is_stop.shape[1] + 1), axis=1)
    return verified.replace(count=jnp.minimum(jnp.minimum(verified.count, first_stop), room))
