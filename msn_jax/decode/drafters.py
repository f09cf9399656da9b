"""Drafters: the functions that fill a token tree with draft tokens. The decoding loop is the same for all of them.

A drafter is a static tree and four pure functions over its own draft state:

    init(drafter, drafter_params, prompt)                 -> draft state, from the prompt
    propose(drafter, drafter_params, state)               -> `Proposal` and the draft state
    update(drafter, draft, verified, top)                 -> draft state, from the last verified forward pass
    grow(draft, capacity)                                 -> the same draft state for sequences of `capacity` tokens

`drafter_params` are the parameters of a draft model (`draft_model.py`) or a gated adapter (`adapter.py`), else None.
With a gated adapter, the loop runs the tree's noise nodes with it, and they are never accepted. Predicted drafts
are taken from `top`, int32 [B, W, K]: the top-K tokens of the *perturbed* logits (`verify.py`), whose random bits
depend only on the request's key and the position. So under sampling, a predicted draft is drawn with
the same random bits as the token it must match.

All values of `--decoder` except `draft_model` and `auto` differ only in their trees. `autoregressive` has only a
root, `jacobi` a chain of Jacobi nodes, `prompt_lookup` a chain of retrieval nodes. The trees of `tr_jacobi`
("tree-based retrieval-augmented Jacobi" in the MSN paper, arXiv 2406.17404) may combine both sources. Its default is a
chain in which a node takes the retrieved token if the match is long enough, otherwise the Jacobi prediction, otherwise
the token of a shorter match. `auto` also chooses how many nodes each forward pass runs (`adaptive.py`).

Axes: B rows of the batch, W tree nodes, P depth of the tree, K predictions per position, V vocabulary.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from msn_jax import cpu
from msn_jax.cli import InputError
from msn_jax.config import LlamaConfig
from msn_jax.decode import adaptive, retrieval
from msn_jax.decode import tree as trees
from msn_jax.decode.prefill import PromptBatch
from msn_jax.decode.tree import JACOBI, NOISE, RETRIEVAL, RETRIEVAL_OR_JACOBI, ROOT, TokenTree
from msn_jax.decode.verify import Verified

NO_DRAFT = -1  # in place of a token: there is no draft, or the forward pass did not run the node


@dataclasses.dataclass(frozen=True)
class Drafter:
    """A static tree and the functions that fill it. Hashable, because it is part of the compiled program."""

    name: str
    tree: TokenTree
    init: Callable
    propose: Callable
    update: Callable
    grow: Callable = lambda draft, capacity: draft
    cfg: LlamaConfig | None = None  # of the drafter's own model, if it has one
    is_adapted: bool = False  # the loop's `drafter_params` are a gated adapter, active at the tree's noise nodes
    noise_token: int | None = None  # what every noise node holds; None: ahead noise
    widths: tuple[int, ...] = ()  # allowed numbers of nodes per forward pass (`adaptive.py`); (): all nodes

    def first(self, width_index: int) -> "Drafter":
        """The same drafter with only the first `widths[width_index]` nodes of its tree."""
        return dataclasses.replace(self, tree=self.tree.first(self.widths[width_index]), widths=())


@struct.dataclass
class Proposal:
    """The tree filled with draft tokens, and the best retrieved continuation, whether or not drafts come from it."""

    tokens: Array  # int32 [B, W]
    retrieved: Array  # int32 [B, P], the best continuation; -1 if nothing matches, or the tree has no retrieval nodes
    match_lengths: Array  # int32 [B], tokens just before that continuation that match the sequence's suffix
    sources: Array  # int32 [B, W], where each token came from: ROOT, JACOBI, RETRIEVAL or NOISE, for `microscope.py`


@struct.dataclass
class DraftTable:
    """Predictions of the last forward pass for the P positions after the newest token."""

    predictions: Array  # int32 [B, P, K]: the top-K tokens at depth 1..P; -1 where there is no prediction


def init_table(drafter: Drafter, drafter_params: Any, prompt: PromptBatch) -> DraftTable:
    """An empty table: the first forward pass drafts from retrieval in the prompt, and from noise."""
    del drafter_params
    tree = drafter.tree
    return DraftTable(jnp.full((len(prompt.lengths), tree.max_depth, tree.num_predictions), NO_DRAFT, jnp.int32))


def propose_from_table(drafter: Drafter, drafter_params: Any, state: Any) -> tuple[Proposal, DraftTable]:
    """Node tokens from the draft table and the sequence; `state` is the loop's `DecodeState`."""
    del drafter_params
    arguments = (drafter.tree, state.draft.predictions, state.tokens, state.lengths, state.forward_passes + 1)
    return fill_tree(*arguments, drafter.noise_token), state.draft


def update_table(drafter: Drafter, draft: DraftTable, verified: Verified, top: Array) -> DraftTable:
    """The Jacobi iteration: predictions at the rejected nodes become the next drafts.

    Args:
      drafter: its tree determines which rejected nodes predict which position (`TokenTree.continuations`).
      draft: the draft that was just verified; nothing of it is kept.
      verified: gives the last accepted node of each row of the batch.
      top: int32 [B, W, K], the top-K tokens after each node; -1 for nodes that the forward pass did not run.
    """
    del draft  # a position without a fresh prediction gets a retrieved token or noise, never a stale draft
    nodes = jnp.asarray(drafter.tree.continuations)[verified.last_accepted][:, :, None]  # [B, P, 1]
    predictions = jnp.take_along_axis(top, jnp.maximum(nodes, 0), axis=1)
    return DraftTable(jnp.where(nodes >= 0, predictions, NO_DRAFT))


def fill_tree(
    tree: TokenTree,
    predictions: Array,
    tokens: Array,
    lengths: Array,
    pass_index: Array,
    noise_token: int | None = None,
) -> Proposal:
    """Fills the tree: the newest token at the root, and at every other node a draft from its source.

    A node whose source has no draft holds ahead noise.

    Args:
      tree: the static tree.
      predictions: int32 [B, P, K], see `DraftTable`.
      tokens: int32 [B, S], prompt and output so far.
      lengths: int32 [B], valid tokens of each row.
      pass_index: int32 [B], 1 for the first forward pass; varies the noise.
      noise_token: what every NOISE node holds; None: ahead noise.
    """
    batch_size, newest = lengths.shape[0], jnp.take_along_axis(tokens, lengths[:, None] - 1, axis=1)
    noise = ahead_noise(pass_index, tokens, lengths, tree.width)
    filled = noise, jnp.full_like(noise, NOISE)  # tokens and their sources
    # Up to three fills, each overwriting the previous one: (1) retrieved tokens (in RETRIEVAL nodes if the match is
    # long enough, in RETRIEVAL_OR_JACOBI nodes whatever the match), (2) predictions, (3) in RETRIEVAL_OR_JACOBI nodes,
    # retrieved tokens again where the match is long enough.
    sources, ranks = np.array(tree.sources), np.array(tree.ranks)
    depth_index = np.maximum(tree.depth - 1, 0)  # index into the axis P of predictions and retrieved tokens

    def fill(
        filled: tuple[Array, Array], is_source: np.ndarray, draft: Array, source: int, usable: Array | bool = True
    ) -> tuple[Array, Array]:
        is_filled = is_source[None, :] & (draft != NO_DRAFT) & usable
        return jnp.where(is_filled, draft, filled[0]), jnp.where(is_filled, jnp.int32(source), filled[1])

    best, best_match = jnp.full((batch_size, tree.max_depth), NO_DRAFT, jnp.int32), jnp.zeros_like(lengths)
    if tree.num_ranks(RETRIEVAL):
        retrieved, match_lengths = retrieval.retrieve_batch(tokens, lengths, tree.num_ranks(RETRIEVAL), tree.max_depth)
        best, best_match = retrieved[:, 0], match_lengths[:, 0]
        retrieves = (sources == RETRIEVAL) | (sources == RETRIEVAL_OR_JACOBI)
        branch = np.where(retrieves, ranks, 0)
        long_enough = match_lengths[:, branch] >= tree.min_match
        usable = long_enough | (sources == RETRIEVAL_OR_JACOBI)[None, :]
        filled = fill(filled, retrieves, retrieved[:, branch, depth_index], RETRIEVAL, usable)
    if tree.num_ranks(JACOBI):
        predicts = (sources == JACOBI) | (sources == RETRIEVAL_OR_JACOBI)
        predicted = predictions[:, depth_index, np.where(predicts, ranks, 0)]
        if tree.deduplication:
            predicted = _deduplicate(tree, predictions, retrieved, long_enough, predicted)
        filled = fill(filled, predicts, predicted, JACOBI)
    if tree.num_ranks(RETRIEVAL_OR_JACOBI):
        is_either = sources == RETRIEVAL_OR_JACOBI
        filled = fill(filled, is_either, retrieved[:, branch, depth_index], RETRIEVAL, long_enough)
    nodes, filled_from = filled
    if noise_token is not None:
        nodes = jnp.where((sources == NOISE)[None, :], jnp.int32(noise_token), nodes)
    is_root = jnp.broadcast_to(jnp.asarray(sources == ROOT)[None, :], nodes.shape)
    filled_from = jnp.where(is_root, jnp.int32(ROOT), filled_from)
    return Proposal(jnp.where(is_root, newest, nodes), best, best_match, filled_from)


def _deduplicate(tree: TokenTree, predictions: Array, retrieved: Array, long_enough: Array, predicted: Array) -> Array:
    """Gives every JACOBI leaf that is a child of the root a prediction that no RETRIEVAL child of the root holds.

    See `Deduplication` in `tree.py`.

    Args:
      tree: a tree with `deduplication`.
      predictions: int32 [B, P, K], see `DraftTable`.
      retrieved: int32 [B, branches, P], the retrieved continuations.
      long_enough: bool [B, W], whether the match of each node's branch is at least `tree.min_match`.
      predicted: int32 [B, W], the prediction at each node; those at such leaves are replaced.
    """
    leaves, branches, fixed_ranks, order = tree.deduplication
    branch = np.array(tree.ranks)[branches]
    first = jnp.where(long_enough[:, branches], retrieved[:, branch, 0], NO_DRAFT)  # [B, m], tokens of the branches
    candidates = predictions[:, 0]  # [B, K]
    is_fixed = np.isin(np.arange(candidates.shape[1]), fixed_ranks)
    is_free = ~jnp.any(candidates[:, :, None] == first[:, None, :], axis=-1) & ~is_fixed[None, :]
    free_rank = jnp.cumsum(is_free, axis=1) - 1
    chosen = jnp.argmax(is_free[:, None, :] & (free_rank[:, None, :] == order[None, :, None]), axis=-1)
    return predicted.at[:, leaves].set(jnp.take_along_axis(candidates, chosen, axis=1))


def top_k_tokens(perturbed_logits: Array, count: int) -> Array:
    """int32 [..., count]: the top tokens of perturbed logits [..., V]; -1 for those missing if `count` exceeds V.

    With `count` 1, this is the argmax that verification needs, too, and XLA computes it once.
    """
    if count == 0:
        return jnp.zeros((*perturbed_logits.shape[:-1], 0), jnp.int32)
    if count == 1:
        return cpu.argmax(perturbed_logits)[..., None]
    top = jax.lax.top_k(perturbed_logits, min(count, perturbed_logits.shape[-1]))[1].astype(jnp.int32)
    missing = [(0, 0)] * (top.ndim - 1) + [(0, count - top.shape[-1])]
    return jnp.pad(top, missing, constant_values=NO_DRAFT)


def ahead_noise(pass_index: Array, tokens: Array, lengths: Array, count: int) -> Array:
    """int32 [B, count]: tokens from pseudo-random positions of each row, which change with `pass_index`, int32 [B].

    A hash (lowbias32, by C. Wellons) stands in for a PRNG, which would take longer than a whole layer of a small model.
    The noise affects only the acceptance rate, never the output; a row's noise does not depend on other rows.
    """
    seeds = pass_index.astype(jnp.uint32) * jnp.uint32(0x9E3779B9)
    bits = jnp.arange(count, dtype=jnp.uint32)[None, :] + seeds[:, None]
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        bits = (bits ^ (bits >> jnp.uint32(shift))) * jnp.uint32(factor)
    bits = (bits ^ (bits >> jnp.uint32(16))) % lengths[:, None].astype(jnp.uint32)
    return jnp.take_along_axis(tokens, bits.astype(jnp.int32), axis=1)


def self_drafter(name: str, tree: TokenTree) -> Drafter:
    """A drafter that needs only the sequence and the model's own last forward pass."""
    return Drafter(name, tree, init_table, propose_from_table, update_table)


# The defaults have few nodes, to suit small models and CPUs. `calibrate` finds the best tree for a model and machine.
DEFAULT_TREES = {
    "autoregressive": trees.build([]),
    "jacobi": trees.chain(JACOBI, 3),
    "prompt_lookup": trees.chain(RETRIEVAL, 3),
    "tr_jacobi": trees.chain(RETRIEVAL_OR_JACOBI, 3, min_match=2),
}


# A longer chain than that of `tr_jacobi`, because no forward pass has to run all of it.
_AUTO_TREE = trees.chain(RETRIEVAL_OR_JACOBI, 7, min_match=2)


# With a gated adapter, predictions come from noise tails: two noise nodes behind the root and behind every draft. They
# reach only depth 2, so the tree of `jacobi` branches instead of being a longer chain.
TAIL_LENGTH = 2
ADAPTED_TREES = {
    "jacobi": trees.add_tails(
        trees.build([(0, JACOBI, 0), (0, JACOBI, 1), (0, JACOBI, 2), (1, JACOBI, 0)]), TAIL_LENGTH
    ),
    "tr_jacobi": trees.add_tails(DEFAULT_TREES["tr_jacobi"], TAIL_LENGTH),
    "auto": trees.add_tails(_AUTO_TREE, TAIL_LENGTH, behind=range(TAIL_LENGTH + 1)),  # where predictions can end
}


def adapt(drafter: Drafter, noise_token: int | None) -> Drafter:
    """The same drafter with a gated adapter, whose noise is `noise_token` or ahead noise."""
    return dataclasses.replace(drafter, is_adapted=True, noise_token=noise_token)


def adaptive_drafter(tree: TokenTree | None = None) -> Drafter:
    """The drafter of the decoder `auto`: each forward pass runs as many nodes as are worth their time."""
    drafter = self_drafter("auto", _AUTO_TREE if tree is None else tree)
    return dataclasses.replace(drafter, widths=adaptive.widths(drafter.tree))


def get(name: str, tree: TokenTree | None = None) -> Drafter:
    """The drafter of the decoder `name`, with its default tree or the given one. InputError for an unknown name."""
    if name == "auto":
        return adaptive_drafter(tree)
    if name not in DEFAULT_TREES:
        raise InputError(f"unknown decoder {name!r}: known decoders are auto, {', '.join(DEFAULT_TREES)}, draft_model")
    return self_drafter(name, DEFAULT_TREES[name] if tree is None else tree)
