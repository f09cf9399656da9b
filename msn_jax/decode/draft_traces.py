"""Draft traces: the drafts that a forward pass would find at every position of known completions.

`tree_search.py` searches for trees with these statistics. The output does not depend on the tree, so the completions
can be generated before any tree is known. For every position of every completion, the traces hold the drafts available
to a forward pass that starts there:

    jacobi       the top-K predictions for each of the next D positions; none at the start of a completion
    retrieved    the tokens of each retrieved branch, and how many tokens of the suffix it matches

Retrieved tokens depend on the sequence alone. Jacobi predictions depend on the rejected drafts before them. They come
from traced decoding: forward passes that end at given positions, with correct tokens before the end, a wrong draft at
the end, and the drafter's own tokens after it. All positions are traced, not only those where the passes of one tree
start, because the passes of another tree start elsewhere. The predictions of a gated adapter depend on no draft,
because its noise tails attend to accepted tokens alone (`trace_tails`).
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from msn_jax import cache as caches
from msn_jax import llama
from msn_jax.config import LlamaConfig
from msn_jax.decode import batch as batches
from msn_jax.decode import drafters, loop, models, retrieval, verify
from msn_jax.decode import tree as trees
from msn_jax.decode.drafters import Drafter
from msn_jax.decode.loop import DecodeState
from msn_jax.decode.models import Model
from msn_jax.decode.request import Request
from msn_jax.decode.session import DecodeSession
from msn_jax.decode.tree import JACOBI, NOISE, TokenTree
from msn_jax.decode.verify import Verified

DEPTH = 12  # D: predictions and retrieved tokens per position, so the depth of the deepest tree
RANKS = 15  # K: ten ranks, and spares for other children of the root that may hold the same tokens
BRANCHES = 4  # R
NO_DRAFT = np.int32(-1)  # the node would hold noise
UNKNOWN = np.int32(-2)  # a draft that was not traced; counts as wrong
_END = np.int32(-3)  # after the end of a completion; equal to no draft
_BATCH_SIZE = 8  # trajectories traced together

Progress = Callable[[Sequence], Iterable]  # wraps an iterable in a progress bar
Trajectory = tuple[int, Sequence[int]]  # index of a completion, and positions in it where forward passes start


class Completion(NamedTuple):
    """A prompt, its known completion, and the settings that it was generated with."""

    prompt: list[int]
    tokens: list[int]
    request: Request = Request("")


@dataclasses.dataclass(frozen=True)
class DraftTraces:
    """Traces of B completions; N tokens in the longest one."""

    lengths: np.ndarray  # int [B], tokens of each completion
    completions: np.ndarray  # int32 [B, N + D], padded with `_END`
    jacobi: np.ndarray  # int32 [B, N, D, K], `UNKNOWN` where no trajectory starts a forward pass
    retrieved: np.ndarray  # int32 [B, N, R, D], `NO_DRAFT` where nothing matches
    match_lengths: np.ndarray  # int32 [B, N, R], matching tokens of the suffix
    are_of_tails: bool = False  # the Jacobi predictions come from the noise tails of a gated adapter

    @property
    def future_tokens(self) -> np.ndarray:
        """int32 [B, N, D]: the next D tokens at each position. A view."""
        return np.lib.stride_tricks.sliding_window_view(self.completions, DEPTH, axis=1)[:, : self.jacobi.shape[1]]


def retrieval_traces(completions: Sequence[Completion], ranks: int) -> DraftTraces:
    """Traces with the retrieved tokens of every position and unknown Jacobi predictions, K = `ranks`."""
    lengths = np.array([len(completion.tokens) for completion in completions])
    longest = int(lengths.max())
    tokens = np.full((len(completions), longest + DEPTH), _END, np.int32)
    retrieved = np.full((len(completions), longest, BRANCHES, DEPTH), NO_DRAFT, np.int32)
    match_lengths = np.zeros((len(completions), longest, BRANCHES), np.int32)
    slots = batches.bucket_size(max(len(one.prompt) + len(one.tokens) for one in completions))
    for number, completion in enumerate(completions):
        tokens[number, : len(completion.tokens)] = completion.tokens
        sequence = np.zeros(slots, np.int32)
        sequence[: len(completion.prompt) + len(completion.tokens)] = completion.prompt + completion.tokens
        prefix_lengths = np.minimum(len(completion.prompt) + np.arange(longest), slots).astype(np.int32)
        retrieved[number], match_lengths[number] = _retrieve_everywhere(sequence, prefix_lengths)
    jacobi = np.full((len(completions), longest, DEPTH, ranks), UNKNOWN, np.int32)
    return DraftTraces(lengths, tokens, jacobi, retrieved, match_lengths)


@jax.jit
def _retrieve_everywhere(tokens: Array, lengths: Array) -> tuple[Array, Array]:
    return jax.lax.map(lambda length: retrieval.retrieve(tokens, length, BRANCHES, DEPTH), lengths, batch_size=32)


def uniform_trajectories(traces: DraftTraces, accept_length: int) -> list[Trajectory]:
    """Trajectories with `accept_length` tokens per forward pass that together cover every position."""
    return [
        (index, range(first, length, accept_length))
        for index, length in enumerate(traces.lengths)
        for first in range(accept_length)
    ]


def trace(
    model: Model,
    completions: Sequence[Completion],
    traces: DraftTraces,
    tree: TokenTree,
    trajectories: Sequence[Trajectory],
    progress: Progress = iter,
) -> DraftTraces:
    """`traces` with Jacobi predictions at the positions of the trajectories.

    Args:
      model: the model.
      completions: known completions.
      traces: of the same completions.
      tree: its first children from the root on, extended by Jacobi nodes, provide the drafts of each forward pass.
      trajectories: forward passes of at most D + 1 tokens. Each trajectory also gets a first pass from the start of the
        completion to its first position, because that pass has no predictions yet.
      progress: wraps the batches in a progress bar.
    """
    ranks = traces.jacobi.shape[-1]
    drafter = drafters.self_drafter("probe", _probe(tree, ranks))
    trajectories = [(index, np.union1d(0, starts)) for index, starts in trajectories if len(starts)]
    passes = max(len(starts) for _, starts in trajectories)
    longest = max(len(one.prompt) + len(one.tokens) for one in completions)
    capacity = batches.state_capacity(longest + drafter.tree.max_depth + 1)
    jacobi = traces.jacobi.copy()
    for first in progress(range(0, len(trajectories), _BATCH_SIZE)):
        batch = trajectories[first : first + _BATCH_SIZE]
        padded = batch + batch[:1] * (_BATCH_SIZE - len(batch))
        counts = np.zeros((passes, _BATCH_SIZE), np.int32)
        for row, (_, starts) in enumerate(padded):
            counts[: len(starts) - 1, row] = np.diff(starts)
        state = mid_decode_state(model, drafter, [(completions[index], 0) for index, _ in padded], capacity)
        rows = np.asarray(_trace_predictions(model.params, model.cfg, drafter, state, counts))
        for row, (index, starts) in enumerate(batch):
            jacobi[index, starts] = rows[: len(starts), row, :, :ranks]
    return dataclasses.replace(traces, jacobi=jacobi)


def trace_tails(
    model: Model, completions: Sequence[Completion], traces: DraftTraces, decoder: str, progress: Progress = iter
) -> DraftTraces:
    """`traces` with the predictions of the model's gated adapter at every position but the first.

    There are none beyond the length of a noise tail. Arguments as in `trace`, and:

    Args:
      decoder: one that drafts with the adapter.
    """
    ranks = traces.jacobi.shape[-1]
    tail = [(node, NOISE, 0) for node in range(drafters.TAIL_LENGTH)]
    # A leaf of rank K - 1 makes the drafter keep the top K predictions.
    drafter, adapter = models.drafter_of(model, decoder, trees.build([*tail, (0, JACOBI, ranks - 1)]))
    longest = max(len(one.prompt) + len(one.tokens) for one in completions)
    capacity = batches.state_capacity(longest + drafter.tree.max_depth + 1)
    jacobi = np.full_like(traces.jacobi, NO_DRAFT)
    for first in progress(range(0, len(completions), _BATCH_SIZE)):
        batch = completions[first : first + _BATCH_SIZE]
        padded = [(one, 0) for one in [*batch, *batch[:1] * (_BATCH_SIZE - len(batch))]]
        state = mid_decode_state(model, drafter, padded, capacity, adapter)
        passes = max(len(one.tokens) for one in batch)
        rows = np.asarray(_trace_tails(model.params, model.cfg, drafter, state, passes, adapter))
        for row, one in enumerate(batch):
            jacobi[first + row, : len(one.tokens), : rows.shape[2]] = rows[: len(one.tokens), row, :, :ranks]
    return dataclasses.replace(traces, jacobi=jacobi, are_of_tails=True)


def _probe(tree: TokenTree, ranks: int) -> TokenTree:
    """A chain of 2 D nodes, so that every pass predicts D positions: the first children of `tree`, then JACOBI nodes.

    A leaf of rank K - 1 makes the drafter keep the top K predictions.
    """
    chain = [(tree.sources[node], tree.ranks[node]) for node in tree.continuations[0] if node >= 0]
    chain += [(JACOBI, 0)] * (2 * DEPTH - len(chain))
    nodes = [(node, *source) for node, source in enumerate(chain)]
    return trees.build([*nodes, (0, JACOBI, ranks - 1)], tree.min_match)


def mid_decode_state(
    model: Model,
    drafter: Drafter,
    starts: Sequence[tuple[Completion, int]],
    capacity: int,
    drafter_params: dict | None = None,
) -> DecodeState:
    """The loop's state after the first tokens of known completions; no row ever ends.

    Args:
      model: the model.
      drafter: proposes the draft tokens.
      starts: for each row a completion, and how many of its tokens are decoded already (negative: counted from the end
        of the prompt). The later tokens of the completion are stored after `lengths`, as stale entries.
      capacity: of the state.
      drafter_params: the drafter's own parameters, if it has any.
    """
    prefixes = [(one.prompt + one.tokens)[: len(one.prompt) + count] for one, count in starts]
    requests = [dataclasses.replace(one.request, max_new_tokens=1) for one, _ in starts]
    state = DecodeSession(model, drafter, prefixes, requests, len(starts), drafter_params).state
    if state.capacity != capacity:
        state = loop.grow(drafter, state, capacity)
    tokens = np.zeros((len(starts), capacity), np.int32)
    for row, (one, _) in enumerate(starts):
        sequence = (one.prompt + one.tokens)[:capacity]
        tokens[row, : len(sequence)] = sequence
    limits = np.full(len(starts), np.iinfo(np.int32).max, np.int32)
    return state.replace(tokens=tokens, limits=limits, done=np.zeros(len(starts), bool))


@functools.partial(jax.jit, static_argnames=("cfg", "drafter"))
def _trace_predictions(params: dict, cfg: LlamaConfig, drafter: Drafter, state: DecodeState, counts: Array) -> Array:
    """int32 [passes, B, D, K]: the predictions before forward passes that emit `counts` known tokens.

    `counts` is int32 [passes, B].

    A pass differs from `loop.step` in two ways. The nodes to accept hold the correct tokens, and the next node, to be
    rejected, holds a wrong one: the drafter's own token, or its second choice where the first is correct.
    """
    tree, batch = drafter.tree, jnp.arange(state.tokens.shape[0])
    depth = jnp.asarray(tree.depth)[None, :]
    chain = jnp.broadcast_to(jnp.arange(DEPTH + 1, dtype=jnp.int32)[None, :], (len(batch), DEPTH + 1))

    def one_pass(state: DecodeState, count: Array) -> tuple[DecodeState, Array]:
        rows = state.draft.predictions[:, :DEPTH]
        proposal, draft = drafter.propose(drafter, None, state)
        drafts = proposal.tokens
        positions = state.lengths[:, None] - 1 + depth
        correct = jnp.take_along_axis(state.tokens, positions, axis=1, mode="clip")
        top = rows[batch, jnp.clip(count - 1, 0, DEPTH - 1), :2]  # [B, 2]
        other = jnp.where(top[:, :1] == correct, top[:, 1:], top[:, :1])
        other = jnp.where((other < 0) | (other == correct), (correct + 1) % cfg.vocab_size, other)
        wrong = jnp.where(drafts == correct, other, drafts)
        nodes = jnp.where(depth < count[:, None], correct, jnp.where(depth == count[:, None], wrong, drafts))

        output = llama.forward(params, cfg, nodes, positions, jnp.asarray(tree.mask), state.cache)
        verified = Verified(chain, jnp.maximum(count - 1, 0), correct[:, : DEPTH + 1], count)
        logits = verify.perturb_logits(llama.unembed(params, cfg, output.hidden), positions, state.sampler)
        state = state.replace(
            lengths=state.lengths + count,
            cache=caches.commit(state.cache, output.kv, chain, count),
            draft=drafter.update(drafter, draft, verified, drafters.top_k_tokens(logits, tree.num_predictions)),
            forward_passes=state.forward_passes + 1,
        )
        return state, rows

    return jax.lax.scan(one_pass, state, counts)[1]


@functools.partial(jax.jit, static_argnames=("cfg", "drafter", "passes"))
def _trace_tails(
    params: dict, cfg: LlamaConfig, drafter: Drafter, state: DecodeState, passes: int, adapter: dict
) -> Array:
    """int32 [passes, B, P, K]: the predictions before forward passes that accept no draft and emit one known token."""
    batch_size, path = len(state.lengths), (len(state.lengths), drafter.tree.max_depth + 1)

    def one_pass(state: DecodeState, _: None) -> tuple[DecodeState, Array]:
        rows = state.draft.predictions
        proposal, draft = drafter.propose(drafter, adapter, state)
        output = loop.run_nodes(params, cfg, drafter, state, proposal.tokens, adapter, drafter.tree.width)
        root, one = jnp.zeros(batch_size, jnp.int32), jnp.ones(batch_size, jnp.int32)
        verified = Verified(jnp.zeros(path, jnp.int32), root, jnp.zeros(path, jnp.int32), one)
        state = state.replace(
            lengths=state.lengths + 1,
            cache=caches.commit(state.cache, output.kv, verified.path, verified.num_emitted),
            draft=drafter.update(drafter, draft, verified, output.top),
            forward_passes=state.forward_passes + 1,
        )
        return state, rows

    return jax.lax.scan(one_pass, state, length=passes)[1]
