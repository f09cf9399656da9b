"""Verification: which draft tokens of a tree the model itself would have emitted.

The complete rule: a node is accepted if its token equals the target token at its parent, and its parent is accepted.
The root is always accepted. The deepest accepted node ends the path, and the target token there is emitted too (the
bonus token), so every forward pass emits at least one token. Padding of paths is never compared.

The *target token* at a node is the token that autoregressive decoding would emit after the node's path: the argmax of
the perturbed logits. *Perturbed logits* are the logits themselves for greedy rows; for sampled rows they are filtered,
divided by the temperature, and perturbed by Gumbel noise, so that their argmax is a sample (the Gumbel-max trick). The
noise depends only on the request's key and the absolute position, so sampled output, too, is the same for every drafter
and tree.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from msn_jax.decode.tree import TokenTree


@struct.dataclass
class Verified:
    """Result of verifying one forward pass, for every row."""

    path: Array  # int32 [B, P + 1], nodes from the root to `last_accepted`; entries from `num_emitted` on are padding
    last_accepted: Array  # int32 [B], the deepest accepted node
    emitted: Array  # int32 [B, P + 1], new tokens; entries from `num_emitted` on are padding
    num_emitted: Array  # int32 [B], accepted drafts + 1; fewer where `truncate` cuts the pass short


@struct.dataclass
class Sampler:
    """Sampling settings, one entry per row: every array is [B].

    The filters apply in the order of transformers, each to what the previous one kept: temperature, top-k, top-p,
    min-p. Tokens tied with the last kept one are kept too.
    """

    temperature: Array  # float32; 0 is greedy and ignores the filters
    top_k: Array  # int32, keeps the k most probable tokens; 0 keeps all
    top_p: Array  # float32, keeps the smallest set of most probable tokens with this total probability; 1 keeps all
    min_p: Array  # float32, keeps tokens with at least this share of the highest probability; 0 keeps all
    keys: Array  # PRNG keys


def perturb_logits(logits: Array, positions: Array, sampler: Sampler) -> Array:
    """Logits float32 [B, W, V] -> perturbed logits of the same shape: their argmax is the target token.

    Nodes at the same position share their Gumbel noise, whichever path leads to them. So does a draft for that
    position, which therefore predicts the sampled token and not just the most probable one.

    Args:
      logits: float32 [B, W, V].
      positions: int32 [B, W], absolute positions of the nodes.
      sampler: settings and keys.
    """

    def perturb(logits: Array) -> Array:
        def gumbel(key: Array, position: Array) -> Array:
            return jax.random.gumbel(jax.random.fold_in(key, position), logits.shape[-1:], jnp.float32)

        temperature = sampler.temperature[:, None, None]
        noise = jax.vmap(jax.vmap(gumbel, (None, 0)))(sampler.keys, positions)
        relative = logits - jnp.max(logits, axis=-1, keepdims=True)  # a tiny temperature must not overflow the maximum
        kept = _filter(relative / jnp.where(temperature > 0, temperature, 1), sampler)
        return jnp.where(temperature > 0, kept + noise, logits)

    return jax.lax.cond(jnp.any(sampler.temperature > 0), perturb, lambda logits: logits, logits)


def _filter(logits: Array, sampler: Sampler) -> Array:
    """Logits [B, W, V] with -inf for the tokens that top-k, top-p and min-p remove."""
    top_k, top_p, min_p = (value[:, None, None] for value in (sampler.top_k, sampler.top_p, sampler.min_p))

    def by_rank(logits: Array) -> Array:
        ordered = -jnp.sort(-logits, axis=-1)
        rank = jnp.arange(logits.shape[-1])[None, None, :]
        in_top_k = (rank < top_k) | (top_k == 0)
        probability = jax.nn.softmax(jnp.where(in_top_k, ordered, -jnp.inf), axis=-1)
        before = jnp.cumsum(probability, axis=-1) - probability
        kept = in_top_k & ((before < top_p) | (top_p >= 1) | (rank == 0))  # a tiny top-p is 0 in float32
        lowest = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
        return jnp.where(logits < lowest, -jnp.inf, logits)

    needs_ranks = jnp.any((sampler.top_k > 0) | (sampler.top_p < 1))
    logits = jax.lax.cond(needs_ranks, by_rank, lambda logits: logits, logits)
    highest = jnp.max(logits, axis=-1, keepdims=True)
    return jnp.where(logits < highest + jnp.log(min_p), -jnp.inf, logits)  # log(0) keeps all tokens; NaN stays


def verify(tree: TokenTree, node_tokens: Array, target_tokens: Array) -> Verified:
    """Accepts the longest path on which every draft token matches.

    Args:
      tree: the static tree.
      node_tokens: int32 [B, W], the newest token at the root and draft tokens elsewhere.
      target_tokens: int32 [B, W], the token that the model emits after each node.
    """
    parents = np.maximum(tree.parents, 0)
    matches = node_tokens == target_tokens[:, parents]
    matches = matches.at[:, 0].set(True)
    is_accepted = jnp.all(matches[:, None, :] | ~jnp.asarray(tree.mask), axis=-1)
    last = jnp.argmax(jnp.where(is_accepted, jnp.asarray(tree.depth)[None, :], -1), axis=-1).astype(jnp.int32)
    path = jnp.asarray(tree.paths)[last]
    emitted = jnp.take_along_axis(target_tokens, path, axis=1)
    return Verified(path, last, emitted, jnp.asarray(tree.depth)[last] + 1)


def truncate(verified: Verified, is_stop: Array, remaining: Array) -> Verified:
    """Truncates the emitted tokens after the first stop token and at the request's limit.

    Args:
      verified: result of `verify`.
      is_stop: bool [B, P + 1], whether an emitted token is a stop token. The stop token itself is kept.
      remaining: int32 [B], tokens the row may still emit; 0 for a finished row.
    """
    steps = jnp.arange(1, is_stop.shape[1] + 1, dtype=jnp.int32)
    first_stop = jnp.min(jnp.where(is_stop, steps[None, :], is_stop.shape[1] + 1), axis=1)
    return verified.replace(num_emitted=jnp.minimum(jnp.minimum(verified.num_emitted, first_stop), remaining))
