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
    """How the choices of every row are made: every array is [B], one entry per request.

    The filters are applied in transformers' order, each to what the one before has left: temperature, top-k, top-p,
    min-p. Tokens as good as the last one kept are kept as well.
    """

    temperature: Array  # float32; 0 takes the best token, whatever the filters say
    top_k: Array  # int32, the best tokens that stay; 0: all
    top_p: Array  # float32, the best tokens that together are as probable as this stay; 1: all
    min_p: Array  # float32, tokens stay that are at least this probable, as a share of the best one's; 0: all
    keys: Array  # PRNG keys


def scores(logits: Array, positions: Array, sampler: Sampler) -> Array:
    """What the model's choice after every node is the argmax of: float32 [B, W, V].

    For greedy rows these are the logits. Samples use the Gumbel-max trick: filtered logits / temperature + g, with g
    drawn for the position of the node. Nodes at the same position share g, whichever path leads to them; so does a
    draft for that position, which therefore guesses the sample and not just the best token.

    Args:
      logits: float32 [B, W, V].
      positions: int32 [B, W], absolute, of the nodes.
      sampler: settings and keys.
    """

    def perturbed(logits: Array) -> Array:
        def gumbel(key: Array, position: Array) -> Array:
            return jax.random.gumbel(jax.random.fold_in(key, position), logits.shape[-1:], jnp.float32)

        temperature = sampler.temperature[:, None, None]
        noise = jax.vmap(jax.vmap(gumbel, (None, 0)))(sampler.keys, positions)
        behind = logits - jnp.max(logits, axis=-1, keepdims=True)  # so that no temperature makes the best one infinite
        kept = _filtered(behind / jnp.where(temperature > 0, temperature, 1), sampler)
        return jnp.where(temperature > 0, kept + noise, logits)

    return jax.lax.cond(jnp.any(sampler.temperature > 0), perturbed, lambda logits: logits, logits)


def _filtered(logits: Array, sampler: Sampler) -> Array:
    """Logits [B, W, V] with -inf for the tokens that top-k, top-p and min-p leave out."""
    top_k, top_p, min_p = (value[:, None, None] for value in (sampler.top_k, sampler.top_p, sampler.min_p))

    def by_rank(logits: Array) -> Array:
        ordered = -jnp.sort(-logits, axis=-1)
        rank = jnp.arange(logits.shape[-1])[None, None, :]
        among_k = (rank < top_k) | (top_k == 0)
        probable = jax.nn.softmax(jnp.where(among_k, ordered, -jnp.inf), axis=-1)
        before = jnp.cumsum(probable, axis=-1) - probable
        stays = among_k & ((before < top_p) | (top_p >= 1) | (rank == 0))  # a tiny top-p is 0 in float32
        last = jnp.min(jnp.where(stays, ordered, jnp.inf), axis=-1, keepdims=True)
        return jnp.where(logits >= last, logits, -jnp.inf)

    ranked = jnp.any((sampler.top_k > 0) | (sampler.top_p < 1))
    logits = jax.lax.cond(ranked, by_rank, lambda logits: logits, logits)
    best = jnp.max(logits, axis=-1, keepdims=True)
    return jnp.where(logits >= best + jnp.log(min_p), logits, -jnp.inf)  # log(0) leaves everything in


def best_tokens(scores: Array) -> Array:
    """int32 [...]: the best token of scores [..., V], the first of several. An argmax in two reductions, because XLA on
    CPUs does one that carries both value and place without vector instructions.
    """
    index = jax.lax.broadcasted_iota(jnp.int32, scores.shape, scores.ndim - 1)
    is_best = scores == jnp.max(scores, axis=-1, keepdims=True)
    return jnp.min(jnp.where(is_best, index, scores.shape[-1] - 1), axis=-1)


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
