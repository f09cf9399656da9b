"""Simulated machines and texts for the width policy: the time to emit a text by any rule for the width of a pass."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from msn_jax.decode import adaptive
from msn_jax.decode import tree as trees
from msn_jax.decode.tree import LONGEST_MATCH, RETRIEVAL_OR_JACOBI

TREE = trees.chain(RETRIEVAL_OR_JACOBI, 7, min_match=2)
WIDTHS = (1, 4, 8)
DEPTH = TREE.max_depth


@struct.dataclass
class World:
    """A machine, and a text with the drafts at every position. N tokens, padded by P."""

    relative_time: Array  # float32 [n]
    match_lengths: Array  # int32 [N + P]
    retrieved: Array  # bool [N + P], whether the retrieved token at this position is correct
    predicted: Array  # bool [N + P], whether a Jacobi prediction is


def world(key: Array, tokens: int, drifts: bool) -> World:
    """Random times of a pass, and random rates at which matches begin, go on, and predictions are correct.

    With `drifts`, the second half of the text has rates of its own.
    """
    keys = jax.random.split(key, 8)
    slope = jnp.exp(jax.random.uniform(keys[0], minval=np.log(0.02), maxval=np.log(0.8)))  # time per extra node
    relative_time = 1 + slope * (np.array(WIDTHS, np.float32) - 1) ** jax.random.uniform(
        keys[1], minval=0.6, maxval=1.0
    )
    second_half = (jnp.arange(tokens + DEPTH) >= tokens // 2) & drifts

    def rate(key: Array, low: float, high: float) -> Array:
        first, second = jax.random.uniform(key, (2,), minval=low, maxval=high)
        return jnp.where(second_half, second, first)

    begins, goes_on, predicted = rate(keys[2], 0.0, 0.6), rate(keys[3], 0.2, 0.95), rate(keys[4], 0.0, 0.7) ** 2
    draws = jax.random.uniform(keys[5], (4, tokens + DEPTH))

    def token(match: Array, at: Array) -> tuple[Array, tuple[Array, Array]]:
        chance = goes_on[at] * (1 - jnp.exp2(-(match + 1).astype(jnp.float32)))
        correct = (draws[0, at] < chance) & (match > 0)
        fresh = jnp.where(
            draws[1, at] < begins[at], 1 + jnp.floor(-2 * jnp.log(draws[2, at] + 1e-6)).astype(jnp.int32), 0
        )
        after = jnp.where(correct, match + 1, jnp.minimum(fresh, LONGEST_MATCH))
        return jnp.minimum(after, LONGEST_MATCH).astype(jnp.int32), (match, correct)

    _, (match_lengths, retrieved) = jax.lax.scan(token, jnp.int32(0), jnp.arange(tokens + DEPTH))
    return World(relative_time, match_lengths, retrieved, draws[3] < predicted)


@functools.partial(jax.jit, static_argnames=("tokens", "fixed"))
def emission_time(world: World, policy: adaptive.WidthPolicy, tokens: int, fixed: int | None = None):
    """Units of time for all tokens, by the policy or with a fixed width; the final policy."""
    steps = np.arange(DEPTH, dtype=np.int32)
    depths = np.array([TREE.depth[:width].max() for width in WIDTHS])

    def one_pass(carry):
        at, time, has_predictions, policy = carry
        match = world.match_lengths[at]
        chosen, explores = adaptive.choose(policy, TREE, WIDTHS, match[None], jnp.ones(1, bool))
        chosen = chosen if fixed is None else jnp.int32(fixed)
        depth = jnp.asarray(depths)[chosen]
        retrieved, predicted = world.retrieved[at + steps], world.predicted[at + steps] & has_predictions
        correct = jnp.where(match >= TREE.min_match, retrieved, predicted)
        accepted = jnp.sum(jnp.cumprod((correct & (steps < depth)).astype(jnp.int32)))
        true = at + steps + 1  # a token is its position
        drafts = [jnp.where(right, true, 10**6)[None] for right in (retrieved, world.predicted[at + steps])]
        predictions = jnp.where(has_predictions, drafts[1], -1)
        emitted = jnp.concatenate([true, true[-1:] + 1])[None]
        policy = adaptive.update(
            policy,
            chosen,
            explores,
            emitted,
            accepted[None] + 1,
            jnp.where(match > 0, drafts[0], -1),
            match[None],
            predictions,
        )
        return at + accepted + 1, time + world.relative_time[chosen], depth > 0, policy

    at, time, _, policy = jax.lax.while_loop(
        lambda carry: carry[0] < tokens, one_pass, (jnp.int32(0), jnp.float32(0), jnp.array(False), policy)
    )
    return time * tokens / at.astype(jnp.float32), policy  # the last pass may go beyond the text
