"""Drafters: who guesses the tokens of a tree. The loop is the same for all of them.

A drafter is a static tree and three pure functions over a draft state of its own:

    init(tree, logits)                                   -> draft state, from the prefill
    propose(tree, draft, tokens, lengths, passes)        -> node tokens [B, W]
    update(tree, draft, verified, logits)                -> draft state, from the last verified pass

The self-drafting decoders differ only in their trees: `autoregressive` has the root alone, `jacobi` a chain of
Jacobi nodes, `prompt_lookup` a chain of retrieval nodes, and `tr_jacobi` takes what is better, node by node.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from msn_jax.cli import InputError
from msn_jax.decode import retrieval
from msn_jax.decode import tree as trees
from msn_jax.decode.tree import EITHER, JACOBI, RETRIEVAL, ROOT, TokenTree
from msn_jax.decode.verify import Verified

_ENOUGH = 2  # tokens of the suffix that must match for an EITHER node to prefer retrieval to a prediction
_NO_GUESS = -1  # in a draft table or a retrieved branch: filled with fresh ahead noise


@dataclasses.dataclass(frozen=True)
class Drafter:
    """A static tree and the functions that fill it. Hashable: part of the compiled program."""

    name: str
    tree: TokenTree
    init: Callable
    propose: Callable
    update: Callable


@struct.dataclass
class DraftTable:
    """What the last pass predicted for the places behind the newest token."""

    rows: Array  # int32 [B, P, K]: the K best tokens for depth 1..P; -1 where nothing was predicted


def init_table(tree: TokenTree, logits: Array) -> DraftTable:
    """The first draft: the prefill ran over the newest token and noise behind it; logits [B, P, V] are those."""
    return DraftTable(_top_tokens(logits, tree.count(JACOBI)))


def propose_from_table(tree: TokenTree, draft: DraftTable, tokens: Array, lengths: Array, passes: Array) -> Array:
    """Node tokens [B, W]: the newest token at the root, and at each node what its source has for it."""
    batch_size, width = lengths.shape[0], tree.width
    newest = jnp.take_along_axis(tokens, lengths[:, None] - 1, axis=1)
    nodes = ahead_noise(passes, tokens, lengths, width)
    sources, ranks, row = np.array(tree.sources), np.array(tree.ranks), np.maximum(tree.depth - 1, 0)

    def fill(nodes: Array, from_here: np.ndarray, guess: Array, good: Array | bool = True) -> Array:
        return jnp.where(from_here[None, :] & (guess != _NO_GUESS) & good, guess, nodes)

    if tree.count(RETRIEVAL):
        found, agreement = retrieval.retrieve_batch(tokens, lengths, tree.count(RETRIEVAL), tree.max_depth)
        retrieved = (sources == RETRIEVAL) | (sources == EITHER)
        branch = np.where(retrieved, ranks, 0)
        nodes = fill(nodes, retrieved, found[:, branch, row])
    if tree.count(JACOBI):
        predicted = (sources == JACOBI) | (sources == EITHER)
        nodes = fill(nodes, predicted, draft.rows[:, row, np.where(predicted, ranks, 0)])
    if tree.count(EITHER):
        nodes = fill(nodes, sources == EITHER, found[:, branch, row], agreement[:, branch] >= _ENOUGH)
    is_root = jnp.broadcast_to(jnp.asarray(sources == ROOT)[None, :], (batch_size, width))
    return jnp.where(is_root, newest, nodes)


def update_table(tree: TokenTree, draft: DraftTable, verified: Verified, logits: Array) -> DraftTable:
    """The Jacobi iteration: the logits behind the rejected rest of the tree are the next draft.

    Args:
      tree: the static tree.
      draft: the draft that was verified; nothing of it is kept.
      verified: which node was the last right one.
      logits: float32 [B, W, V] of the pass.
    """
    del draft  # a row without a fresh prediction holds noise, never an old guess
    behind = jnp.asarray(tree.continuations)[verified.last][:, :, None]  # [B, P, 1]
    best = _top_tokens(logits, tree.count(JACOBI))  # of all nodes: with K = 1 that is what verification computes anyway
    rows = jnp.take_along_axis(best, jnp.maximum(behind, 0), axis=1)
    return DraftTable(jnp.where(behind >= 0, rows, _NO_GUESS))


def _top_tokens(logits: Array, count: int) -> Array:
    """int32 [..., count]: the best tokens of logits [..., V]."""
    if count == 0:
        return jnp.zeros((*logits.shape[:-1], 0), jnp.int32)  # and the compiler drops the logits
    if count == 1:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)[..., None]
    return jax.lax.top_k(logits, count)[1].astype(jnp.int32)


def ahead_noise(passes: Array, tokens: Array, lengths: Array, count: int) -> Array:
    """int32 [B, count] tokens of each row's text, at places that look random and change with `passes`, int32 [B].

    A hash (lowbias32, by C. Wellons) stands in for a PRNG, whose rounds would cost more than a small model's layer.
    No text depends on it, only how often a draft is right; and a row's drafts do not depend on its neighbours.
    """
    bits = jnp.arange(count, dtype=jnp.uint32)[None, :] + passes[:, None].astype(jnp.uint32) * jnp.uint32(0x9E3779B9)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        bits = (bits ^ (bits >> jnp.uint32(shift))) * jnp.uint32(factor)
    bits = (bits ^ (bits >> jnp.uint32(16))) % lengths[:, None].astype(jnp.uint32)
    return jnp.take_along_axis(tokens, bits.astype(jnp.int32), axis=1)


def self_drafter(name: str, tree: TokenTree) -> Drafter:
    """A drafter that needs nothing but the model's own last pass and the text."""
    return Drafter(name, tree, init_table, propose_from_table, update_table)


# Narrow, because the default has to suit small models and CPUs too; `--tree` takes any other.
DEFAULT_TREES = {
    "autoregressive": trees.build([]),
    "jacobi": trees.chain(JACOBI, 3),
    "prompt_lookup": trees.chain(RETRIEVAL, 3),
    "tr_jacobi": trees.chain(EITHER, 3),
}


def get(name: str, tree: TokenTree | None = None) -> Drafter:
    """The drafter called `name`, with its default tree or another one. InputError for an unknown name."""
    if name not in DEFAULT_TREES:
        raise InputError(f"unknown decoder {name!r}: known are {', '.join(DEFAULT_TREES)}")
    return self_drafter(name, DEFAULT_TREES[name] if tree is None else tree)
