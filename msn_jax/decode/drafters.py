"""Drafters: who guesses the tokens of a tree. The loop is the same for all of them.

A drafter is a static tree and four pure functions over a draft state of its own:

    init(drafter, weights, prompt)                -> draft state, from the prompt
    propose(drafter, weights, state)              -> node tokens [B, W], and the draft state
    update(drafter, draft, verified, scores)      -> draft state, from the last verified pass
    grow(draft, capacity)                         -> the same draft state for texts of `capacity` tokens

`weights` are the drafter's own parameters, if it has any (`draft_model.py`); scores are what the model's choices are
the argmax of (`verify.py`), so that under sampling, too, a draft guesses the very token that will be chosen.

The self-drafting decoders differ only in their trees: `autoregressive` has the root alone, `jacobi` a chain of
Jacobi nodes, `prompt_lookup` a chain of retrieval nodes, and `tr_jacobi` takes what is better, node by node.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from msn_jax.cli import InputError
from msn_jax.config import LlamaConfig
from msn_jax.decode import retrieval
from msn_jax.decode import tree as trees
from msn_jax.decode.prompts import Prompt
from msn_jax.decode.tree import EITHER, JACOBI, RETRIEVAL, ROOT, TokenTree
from msn_jax.decode.verify import Verified, best_tokens

_NO_GUESS = -1  # in a draft table or a retrieved branch: filled with fresh ahead noise


@dataclasses.dataclass(frozen=True)
class Drafter:
    """A static tree and the functions that fill it. Hashable: part of the compiled program."""

    name: str
    tree: TokenTree
    init: Callable
    propose: Callable
    update: Callable
    grow: Callable = lambda draft, capacity: draft
    cfg: LlamaConfig | None = None  # of the drafter's own model, if it has one


@struct.dataclass
class DraftTable:
    """What is guessed for the places behind the newest token."""

    rows: Array  # int32 [B, P, K]: the K best tokens for depth 1..P; -1 where nothing was predicted


def init_table(drafter: Drafter, weights: Any, prompt: Prompt) -> DraftTable:
    """Nothing is predicted before the first pass: it begins with what retrieval finds in the prompt, and noise."""
    del weights
    tree = drafter.tree
    return DraftTable(jnp.full((len(prompt.lengths), tree.max_depth, tree.predictions), _NO_GUESS, jnp.int32))


def propose_from_table(drafter: Drafter, weights: Any, state: Any) -> tuple[Array, DraftTable]:
    """Node tokens [B, W] from the table and the text; `state` is the loop's `DecodeState`."""
    del weights
    tokens = fill_tree(drafter.tree, state.draft.rows, state.tokens, state.lengths, state.forward_passes + 1)
    return tokens, state.draft


def update_table(drafter: Drafter, draft: DraftTable, verified: Verified, scores: Array) -> DraftTable:
    """The Jacobi iteration: the choices behind the rejected rest of the tree are the next draft.

    Args:
      drafter: its tree says where the next draft lies.
      draft: the draft that was verified; nothing of it is kept.
      verified: which node was the last right one.
      scores: float32 [B, W, V] of the pass.
    """
    del draft  # a row without a fresh prediction holds noise, never an old guess
    behind = jnp.asarray(drafter.tree.continuations)[verified.last][:, :, None]  # [B, P, 1]
    best = top_tokens(scores, drafter.tree.predictions)  # of all nodes: K = 1 is what verification computes anyway
    rows = jnp.take_along_axis(best, jnp.maximum(behind, 0), axis=1)
    return DraftTable(jnp.where(behind >= 0, rows, _NO_GUESS))


def fill_tree(tree: TokenTree, rows: Array, tokens: Array, lengths: Array, passes: Array) -> Array:
    """Node tokens [B, W]: the newest token at the root, and at each node what its source has for it.

    Args:
      tree: the static tree.
      rows: int32 [B, P, K], see `DraftTable`.
      tokens: int32 [B, S], the texts.
      lengths: int32 [B], their lengths.
      passes: int32 [B], varies the noise.
    """
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
        enough = agreement[:, branch] >= tree.min_match
        nodes = fill(nodes, retrieved, found[:, branch, row], enough | (sources == EITHER)[None, :])
    if tree.count(JACOBI):
        predicted = (sources == JACOBI) | (sources == EITHER)
        guess = rows[:, row, np.where(predicted, ranks, 0)]
        if tree.leaves_beside_retrieval:
            guess = _without_duplicates(tree, rows, found, enough, guess)
        nodes = fill(nodes, predicted, guess)
    if tree.count(EITHER):
        nodes = fill(nodes, sources == EITHER, found[:, branch, row], enough)
    is_root = jnp.broadcast_to(jnp.asarray(sources == ROOT)[None, :], (batch_size, width))
    return jnp.where(is_root, newest, nodes)


def _without_duplicates(tree: TokenTree, rows: Array, found: Array, enough: Array, guess: Array) -> Array:
    """`guess` [B, W], where a leaf below the root does not guess what a retrieved branch beside it begins with: the
    predictions behind it move up instead.
    """
    leaves, branches = tree.leaves_beside_retrieval
    ranks = np.array(tree.ranks)
    first = jnp.where(enough[:, branches], found[:, ranks[branches], 0], _NO_GUESS)  # [B, number of branches]
    candidates = rows[:, 0]  # [B, K]
    taken = np.isin(np.arange(candidates.shape[1]), ranks[tree.inner_predictions])  # by nodes that keep their guess
    free = ~jnp.any(candidates[:, :, None] == first[:, None, :], axis=-1) & ~taken[None, :]
    place = jnp.cumsum(free, axis=1) - 1
    wanted = np.array([rank - np.count_nonzero(taken[:rank]) for rank in ranks[leaves]])
    chosen = jnp.argmax(free[:, None, :] & (place[:, None, :] == wanted[None, :, None]), axis=-1)
    return guess.at[:, leaves].set(jnp.take_along_axis(candidates, chosen, axis=1))


def top_tokens(scores: Array, count: int) -> Array:
    """int32 [..., count]: the best tokens of scores [..., V], then -1 where there are no more."""
    if count == 0:
        return jnp.zeros((*scores.shape[:-1], 0), jnp.int32)  # and the compiler drops the scores
    if count == 1:
        return best_tokens(scores)[..., None]
    best = jax.lax.top_k(scores, min(count, scores.shape[-1]))[1].astype(jnp.int32)
    missing = [(0, 0)] * (best.ndim - 1) + [(0, count - best.shape[-1])]
    return jnp.pad(best, missing, constant_values=_NO_GUESS)


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


# Narrow, because the default has to suit small models and CPUs too; `calibrate` finds what suits a model and a machine.
DEFAULT_TREES = {
    "autoregressive": trees.build([]),
    "jacobi": trees.chain(JACOBI, 3),
    "prompt_lookup": trees.chain(RETRIEVAL, 3),
    "tr_jacobi": trees.chain(EITHER, 3, min_match=2),
}


def get(name: str, tree: TokenTree | None = None) -> Drafter:
    """The drafter called `name`, with its default tree or another one. InputError for an unknown name."""
    if name not in DEFAULT_TREES:
        raise InputError(f"unknown decoder {name!r}: known are {', '.join(DEFAULT_TREES)}")
    return self_drafter(name, DEFAULT_TREES[name] if tree is None else tree)
