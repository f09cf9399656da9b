"""Adaptive width: how many nodes of the tree each forward pass runs. The choice never changes the output.

Parents precede children, so the first w nodes of a tree are a tree, too. A forward pass over w tokens takes longer than
one over the root alone, on a CPU up to w times as long, and pays only if drafts are accepted. Let

    s(w)    be the time of a pass over w nodes, in units of a pass over the root alone (measured, `scheduler.py`),
    g(w)    the expected number of accepted drafts, given the drafts at hand,
    r       the current rate: tokens per unit of time and row.

The policy runs the w with the largest g(w) - c r (s(w) - 1): the tokens that the drafts add, less the tokens that the
extra time would produce elsewhere. With c = 1 and r at its optimum, this rule maximizes the long-run rate
(renewal-reward theorem); the current rate approaches it. A slightly larger c makes up for the selection of estimates
that are too high.

g comes from two statistics, updated by every forward pass:

    retrieval[m]    how often the continuation of a match of m tokens is correct. A correct token lengthens the match
                    by one, so the chance that d retrieved tokens are correct is the product of d neighbouring entries.
                    Every pass scores the retrieved continuation against the tokens it emits, whether it verified the
                    continuation or not, so this statistic costs nothing.
    jacobi[d]       how often the Jacobi prediction at depth d + 1 is correct if those before it are. There are such
                    predictions only after a pass with rejected nodes (if the tree has noise tails: with its tails), so
                    the policy explores: a few passes at a time, within a budget, a small share of the total time.

Both can be wrong, so the loss against the root alone is bounded by construction: every unit of time beyond one per
token is taken from a credit, which accepted drafts and a small share of the time restore. A pass may spend what is
left, and a part of what its drafts are expected to restore; so the credit can become negative, but never by
more than that part of the tree's depth. Only the passes that measure s(w) are not charged.

Axes: B rows, n widths, P depth of the tree.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from msn_jax.decode.tree import JACOBI, LONGEST_MATCH, NOISE, RETRIEVAL, TokenTree

UNFORCED = -1
_FEW_NODES = 4
_DECAY = 0.995  # of `tokens` and `time` per forward pass, of other statistics per scored draft: the last 200 or so
_PRIOR_TRIALS = 2.0  # scored tokens that a retrieval prior counts for; a Jacobi prior counts for one
_PRIOR_RETRIEVAL = (0.0, 0.2, 0.4, 0.55, 0.65, 0.7, 0.75, 0.8, 0.85)  # by match length; the last one for longer matches
_PRIOR_JACOBI = 0.4
_PRIOR_TIME = 8.0  # weight of the initial rate, one token per unit of time, in units of time
_BURST = 3  # forward passes of one exploration: the first one makes predictions, the others score them
_CAUTION = 1.25  # c above
_EXPLORATION = 2.0  # units of time for exploration at the start, and the most that can be saved up
_EXPLORATION_SHARE = 0.002  # of the time, added to the budget
_CREDIT = 3.5  # units of time that may be lost at the start, and the most that can be saved up
_CREDIT_SHARE = 0.01  # of the time, added to the credit
_ADVANCE = 0.35  # of the expected accepted drafts, which a pass may spend before they restore the credit


@struct.dataclass
class WidthPolicy:
    """Statistics of the policy: small arrays, one set for the whole batch."""

    relative_time: Array  # float32 [n], s(w) of each width, 1 for the root alone
    retrieval: Array  # float32 [2, LONGEST_MATCH + 1], correct and scored tokens
    jacobi: Array  # float32 [2, P], correct and scored predictions
    tokens: Array  # float32 [], tokens emitted
    time: Array  # float32 [], units of time, summed over rows
    budget: Array  # float32 [], units of time left for exploration
    credit: Array  # float32 [], units of time per row that may be lost against the root alone
    burst: Array  # int32 [], forward passes left in this exploration
    forced: Array  # int32 [], index of the width that every pass must run, or `UNFORCED`


def create(tree: TokenTree, relative_time: np.ndarray) -> WidthPolicy:
    """A policy without experience; `relative_time` is s(w) of each width."""
    prior = np.interp(np.arange(LONGEST_MATCH + 1), np.arange(len(_PRIOR_RETRIEVAL)), _PRIOR_RETRIEVAL)
    trials = np.ones(max(tree.max_depth, 1))
    can_predict = np.arange(len(trials)) < (tree.tail_length or len(trials))
    return WidthPolicy(
        relative_time=np.asarray(relative_time, np.float32),
        retrieval=(_PRIOR_TRIALS * np.stack([prior, np.ones_like(prior)])).astype(np.float32),
        jacobi=np.stack([_PRIOR_JACOBI * can_predict, trials]).astype(np.float32),
        tokens=np.float32(_PRIOR_TIME),
        time=np.float32(_PRIOR_TIME),
        budget=np.float32(_EXPLORATION),
        credit=np.float32(_CREDIT),
        burst=np.int32(0),
        forced=np.int32(UNFORCED),
    )


def choose(
    policy: WidthPolicy, tree: TokenTree, widths: tuple[int, ...], match_lengths: Array, active: Array
) -> tuple[Array, Array]:
    """Chooses the width of the next forward pass.

    Args:
      policy: the statistics.
      tree: the whole tree.
      widths: numbers of nodes to choose from, ascending; the first one is 1.
      match_lengths: int32 [B], tokens of the suffix that the best retrieved continuation matches.
      active: bool [B], unfinished rows.

    Returns:
      The index of the width, int32 [], and whether the pass explores, bool [].
    """
    extra_time = policy.relative_time - 1
    accepted = jnp.where(active[:, None], expected_accepted(policy, tree, widths, match_lengths), 0.0)
    accepted = jnp.sum(accepted, axis=0) / jnp.maximum(jnp.sum(active, dtype=jnp.float32), 1)  # per row
    value = accepted - _CAUTION * _rate(policy) * extra_time
    is_affordable = extra_time - _ADVANCE * accepted <= policy.credit
    best = jnp.argmax(jnp.where(is_affordable, value, -jnp.inf)).astype(jnp.int32)
    explored = _explored_width(tree, widths)
    if not tree.num_ranks(JACOBI):
        explores = jnp.zeros((), bool)
    else:
        burst_cost = jnp.minimum(_BURST * extra_time[explored], _EXPLORATION)
        explores = (best == 0) & is_affordable[explored] & ((policy.burst > 0) | (policy.budget >= burst_cost))
    is_forced = policy.forced != UNFORCED
    return jnp.where(is_forced, policy.forced, jnp.where(explores, jnp.int32(explored), best)), explores & ~is_forced


def expected_accepted(policy: WidthPolicy, tree: TokenTree, widths: tuple[int, ...], match_lengths: Array) -> Array:
    """float32 [B, n]: g(w), the expected number of accepted drafts in a pass over each width."""
    depths = np.array([tree.draft_depth[:width].max() for width in widths])
    steps = np.arange(max(tree.max_depth, 1), dtype=np.int32)
    by_depth = jnp.zeros((len(match_lengths), len(steps)))
    if tree.num_ranks(JACOBI):
        by_depth += jnp.cumprod(policy.jacobi[0] / policy.jacobi[1])[None, :]
    if tree.num_ranks(RETRIEVAL):
        correct = policy.retrieval[0] / policy.retrieval[1]
        retrieved = jnp.cumprod(correct[_match_lengths_by_depth(match_lengths, len(steps))], axis=1)
        by_depth = jnp.where((match_lengths >= tree.min_match)[:, None], retrieved, by_depth)
    totals = jnp.cumsum(by_depth, axis=1)
    return jnp.where(depths[None, :] > 0, totals[:, np.maximum(depths - 1, 0)], 0.0)


def update(
    policy: WidthPolicy,
    chosen: Array,
    explores: Array,
    emitted: Array,
    num_emitted: Array,
    retrieved: Array,
    match_lengths: Array,
    predictions: Array,
) -> WidthPolicy:
    """The policy after a forward pass.

    Args:
      policy: before the pass.
      chosen: int32 [], index of the width that it ran.
      explores: bool [], whether it explored.
      emitted: int32 [B, P + 1], its tokens.
      num_emitted: int32 [B]; 0 for finished rows.
      retrieved: int32 [B, P], the best retrieved continuation; -1 if there is none.
      match_lengths: int32 [B], see `choose`.
      predictions: int32 [B, P], the Jacobi predictions before the pass; -1 where there is none.
    """
    depth = retrieved.shape[1]
    steps = np.arange(depth, dtype=np.int32)[None, :]

    def score(drafts: Array) -> Array:
        """float32 [2, B, P]: correct drafts and scored ones. A draft is scored if all drafts before it are correct."""
        is_known = steps < num_emitted[:, None]
        is_correct = (drafts == emitted[:, :depth]) & is_known
        first_wrong = jnp.min(jnp.where(is_correct, jnp.int32(depth), steps), axis=1, keepdims=True)
        scored = (steps <= first_wrong) & is_known & (drafts >= 0)
        return jnp.stack([steps < first_wrong, scored]).astype(jnp.float32)

    matches = jax.nn.one_hot(_match_lengths_by_depth(match_lengths, depth), LONGEST_MATCH + 1)  # [B, P, lengths]
    num_active = jnp.sum(num_emitted > 0).astype(jnp.float32)
    tokens = jnp.sum(num_emitted).astype(jnp.float32)
    time = policy.relative_time[chosen]
    accepted = tokens / jnp.maximum(num_active, 1) - 1  # per row
    net_cost = jnp.where(explores, time - 1 - accepted / _rate(policy), 0.0)
    is_forced = policy.forced != UNFORCED
    credit = jnp.minimum(policy.credit + accepted - (time - 1) + _CREDIT_SHARE * time, _CREDIT)
    in_burst = jnp.where(policy.burst > 0, policy.burst, jnp.where(explores, _BURST, 0))
    burst = jnp.maximum(in_burst - (chosen > 0).astype(jnp.int32), 0)
    return policy.replace(
        retrieval=_add(policy.retrieval, jnp.einsum("cbp,bpm->cm", score(retrieved), matches)),
        jacobi=_add(policy.jacobi, jnp.sum(score(predictions), axis=1)),
        tokens=policy.tokens * _DECAY + tokens,
        time=policy.time * _DECAY + time * num_active,
        budget=jnp.minimum(policy.budget + _EXPLORATION_SHARE * time - net_cost, _EXPLORATION),
        credit=jnp.where(is_forced, policy.credit, credit),
        burst=jnp.where(is_forced, policy.burst, burst),
    )


def widths(tree: TokenTree) -> tuple[int, ...]:
    """The numbers of nodes to choose from: the root alone, a few nodes, all nodes. Empty for a tree of one node.

    If predictions come from noise tails, "a few" are all other nodes.
    """
    if tree.width == 1:
        return ()
    few = tree.width - tree.sources.count(NOISE) if tree.tail_length else _FEW_NODES
    return (*(width for width in (1, few) if width < tree.width), tree.width)


def _explored_width(tree: TokenTree, widths: tuple[int, ...]) -> int:
    """Index of the smallest width whose passes make predictions for the next one."""
    return len(widths) - 1 if tree.tail_length else 1


def _rate(policy: WidthPolicy) -> Array:
    """Tokens per unit of time and row, at least that of the root alone."""
    return jnp.maximum(policy.tokens / policy.time, 1)


def _match_lengths_by_depth(match_lengths: Array, depth: int) -> Array:
    """int32 [B, P]: the match length that a retrieved token extends, if the tokens before it are correct."""
    return jnp.minimum(match_lengths[:, None] + jnp.arange(depth, dtype=jnp.int32)[None, :], LONGEST_MATCH)


def _add(statistic: Array, scores: Array) -> Array:
    """Correct and scored counts [2, ...]: the old ones, decayed once per new score, plus the new ones."""
    keep = jnp.where(scores[1] > 0, _DECAY, 1.0) ** scores[1]
    return statistic * keep[None] + scores
