"""The decoding loop: the model drafts for itself and verifies a tree of drafts in every forward pass.

This is the decoding half of "Make Some Noise" (MSN, arXiv 2406.17404, sections 3.2 and 3.3); `noise.py` is the training
half.

One step of the loop, for every row of the batch at the same time:

    propose   fill the static token tree with draft tokens
    forward   run the tree, or only its first nodes (`adaptive.py`), in one forward pass; each node attends to the
              committed prefix and its own ancestors
    verify    accept the longest path of drafts that match the model's own tokens, and one more token (the bonus)
    commit    append the keys and values of the accepted nodes to the cache; nothing else writes to it
    update    predictions at the rejected nodes become the next drafts

    sequence        def area(w, h): return          the newest token, `return`, is not in the cache yet
    tree nodes      return   w     *     w   <eos>  a chain: the newest token and four drafts
    model predicts    w      *     h     *    ...   the model's own next token after each node
    accepted                 yes   yes   no   no    accepted if the parent is accepted and predicts it
    emitted           w      *     h                two accepted drafts and the bonus: three tokens in one forward pass
    next draft                           *    ...   predicted after the rejected nodes, for the positions after `h`

Every emitted token is the model's own token given exactly the sequence before it, so the output equals that of
autoregressive decoding, token for token, up to rounding, which differs between matrix products over one token and over
several. Autoregressive decoding is the same loop over a tree with only a root.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array
from jax.sharding import Mesh

from msn_jax import cache as caches
from msn_jax import cpu, llama, sharding
from msn_jax.cache import KVCache, LayerKV
from msn_jax.config import LlamaConfig
from msn_jax.decode import adaptive
from msn_jax.decode.adaptive import WidthPolicy
from msn_jax.decode.drafters import NO_DRAFT, Drafter, DraftTable, top_k_tokens
from msn_jax.decode.prefill import PromptBatch, fill_cache
from msn_jax.decode.tree import JACOBI, NOISE, TokenTree
from msn_jax.decode.verify import Sampler, perturb_logits, truncate, verify


@struct.dataclass
class DecodeState:
    """The loop's carry: B rows, each with its own length, limit and `done` flag."""

    tokens: Array  # int32 [B, S], prompt and output; entries from `lengths` on are stale
    lengths: Array  # int32 [B], tokens so far; the newest one is not in the cache yet
    limits: Array  # int32 [B], the length at which a row ends
    done: Array  # bool [B]
    cache: KVCache  # S slots per row; `cache.lengths == lengths - 1`
    draft: Any  # the drafter's own state
    sampler: Sampler
    accept_lengths: Array  # int32 [B, S], tokens emitted by each forward pass of a row; see `Verified.num_emitted`
    forward_passes: Array  # int32 [B]
    policy: WidthPolicy | None = None  # chooses the width (number of nodes) of each pass; None where it is fixed
    passes_by_width: Array | None = None  # int32 [B, n], forward passes of each width

    @property
    def capacity(self) -> int:
        """S: the longest sequence that fits without growing."""
        return self.tokens.shape[1]


@functools.partial(jax.jit, static_argnames=("cfg", "drafter", "chunk", "mesh", "capacity"))
def prefill(
    params: dict,
    cfg: LlamaConfig,
    drafter: Drafter,
    prompts: Array,
    lengths: Array,
    limits: Array,
    sampler: Sampler,
    chunk: int,
    drafter_params: Any = None,
    cache: KVCache | None = None,
    mesh: Mesh | None = None,
    capacity: int | None = None,
) -> DecodeState:
    """Writes all prompt tokens but the last into the cache (`decode/prefill.py`) and initializes the loop's state.

    The last prompt token is the root of the first tree, so the first step already verifies drafts: tokens retrieved
    from the prompt, noise, or tokens of a draft model.

    Args:
      params: the model's parameters, one entry per layer (`llama.decode_layout`).
      cfg: the model's config.
      drafter: proposes the draft tokens.
      prompts: int32 [B, N], padded on the right to N tokens.
      lengths: int32 [B], at least 1.
      limits: int32 [B], the length at which each row ends; a row that starts at its limit is done.
      sampler: how the model's own tokens are chosen, greedily or by sampling.
      chunk: prompt tokens per forward pass; divides N.
      drafter_params: the drafter's own parameters, if it has any.
      cache: holds a committed prefix of each prompt, see `decode/prefill.py`; None starts with an empty cache.
      mesh: the mesh of the parameters, if they are sharded over several devices.
      capacity: S of the returned state, at least N, which is the default. The prefill itself needs only N slots.
    """
    if cache is None:
        cache = caches.create(cfg, *prompts.shape, mesh)
    cache = fill_cache(params, cfg, prompts, lengths, cache, chunk)
    state = DecodeState(
        tokens=prompts,
        lengths=lengths,
        limits=limits,
        done=lengths >= limits,
        cache=cache,
        draft=drafter.init(drafter, drafter_params, PromptBatch(prompts, lengths, chunk)),
        sampler=sampler,
        accept_lengths=jnp.zeros(prompts.shape, jnp.int32),
        forward_passes=jnp.zeros_like(lengths),
        passes_by_width=jnp.zeros((len(lengths), len(drafter.widths)), jnp.int32) if drafter.widths else None,
    )
    return _constrain(state, mesh) if capacity is None else grow(drafter, state, capacity, mesh)


def step(
    params: dict, cfg: LlamaConfig, drafter: Drafter, stop_ids: Array, state: DecodeState, drafter_params: Any = None
) -> DecodeState:
    """One forward pass: every unfinished row gains between 1 and P + 1 tokens, P being the depth of the tree. Pure.

    `stop_ids` is int32 [E], the tokens that end a row.
    """
    tree = drafter.tree
    proposal, draft = drafter.propose(drafter, drafter_params, state)
    run = functools.partial(run_nodes, params, cfg, drafter, state, proposal.tokens, drafter_params)
    if drafter.widths:
        chosen, explores = adaptive.choose(
            state.policy, tree, drafter.widths, proposal.match_lengths, active=~state.done
        )
        output = jax.lax.switch(chosen, [functools.partial(run, width) for width in drafter.widths])
    else:
        output = run(tree.width)
    verified = verify(tree, output.tokens, output.target_tokens)
    is_stop = jnp.any(verified.emitted[:, :, None] == stop_ids[None, None, :], axis=-1)
    verified = truncate(verified, is_stop, remaining=jnp.where(state.done, 0, state.limits - state.lengths))

    is_emitted = jnp.arange(is_stop.shape[1], dtype=jnp.int32)[None, :] < verified.num_emitted[:, None]
    lengths = state.lengths + verified.num_emitted
    if drafter.widths:
        is_chosen = jnp.arange(len(drafter.widths)) == chosen
        counts = state.passes_by_width + (is_chosen[None, :] & ~state.done[:, None]).astype(jnp.int32)
        policy = adaptive.update(
            state.policy,
            chosen,
            explores,
            verified.emitted,
            verified.num_emitted,
            proposal.retrieved,
            proposal.match_lengths,
            _top1_predictions(state, tree),
        )
        state = state.replace(policy=policy, passes_by_width=counts)
    return state.replace(
        tokens=_write(state.tokens, verified.emitted, state.lengths),
        lengths=lengths,
        done=state.done | jnp.any(is_stop & is_emitted, axis=-1) | (lengths >= state.limits),
        cache=caches.commit(state.cache, output.kv, verified.path, verified.num_emitted),
        draft=drafter.update(drafter, draft, verified, output.top),
        accept_lengths=_write(state.accept_lengths, verified.num_emitted[:, None], state.forward_passes),
        forward_passes=state.forward_passes + (~state.done).astype(jnp.int32),
    )


def _top1_predictions(state: DecodeState, tree: TokenTree) -> Array:
    """int32 [B, P]: the top-1 Jacobi predictions that were available to this pass; -1 where there are none."""
    if tree.num_ranks(JACOBI):
        return state.draft.predictions[:, :, 0]
    return jnp.full((len(state.lengths), tree.max_depth), NO_DRAFT, jnp.int32)


@struct.dataclass
class NodeOutput:
    """The result of a forward pass over the first w nodes of a tree, padded to all W nodes.

    Verification never accepts the padding.
    """

    tokens: Array  # int32 [B, W], the node tokens; `NO_DRAFT` where the node must not be accepted
    kv: tuple[LayerKV, ...]  # [B, kv heads, W, head dimension] each
    target_tokens: Array  # int32 [B, W], the model's own token after each node
    top: Array  # int32 [B, W, K], the model's top-K tokens after each node, for the next drafts


def run_nodes(
    params: dict,
    cfg: LlamaConfig,
    drafter: Drafter,
    state: DecodeState,
    node_tokens: Array,
    drafter_params: Any,
    width: int,
) -> NodeOutput:
    """A forward pass over the first `width` nodes of the tree; `node_tokens` is int32 [B, W].

    A gated adapter is active at the noise nodes. They must not be accepted, because their predictions are not those of
    the model alone.
    """
    tree, adapter, gate = drafter.tree, None, None
    is_noise = np.array(tree.sources[:width]) == NOISE
    if drafter.is_adapted and is_noise.any():
        adapter, gate = drafter_params, jnp.asarray(is_noise)[None, :]
    positions = state.lengths[:, None] - 1 + jnp.asarray(tree.depth[:width])[None, :]
    mask = jnp.asarray(tree.mask[:, :width, :width])
    tokens = node_tokens[:, :width]
    output = llama.forward(params, cfg, tokens, positions, mask, state.cache, adapter, gate)
    logits = perturb_logits(llama.unembed(params, cfg, output.hidden), positions, state.sampler)
    # `cpu.argmax` is for all backends, despite the module's name. Where logits contain NaN or +inf it returns the
    # vocabulary size, which the session adds to the stop ids.
    target_tokens = cpu.argmax(logits)
    top = top_k_tokens(logits, tree.num_predictions)
    rest = (0, tree.width - width)
    return NodeOutput(
        tokens=jnp.pad(
            tokens if gate is None else jnp.where(gate, NO_DRAFT, tokens), ((0, 0), rest), constant_values=NO_DRAFT
        ),
        kv=jax.tree.map(lambda new: jnp.pad(new, ((0, 0), (0, 0), rest, (0, 0))), output.kv),
        target_tokens=jnp.pad(target_tokens, ((0, 0), rest)),
        top=jnp.pad(top, ((0, 0), rest, (0, 0)), constant_values=NO_DRAFT),
    )


@functools.partial(jax.jit, static_argnames=("cfg", "drafter", "mesh", "width_index"), donate_argnames="state")
def decode(
    params: dict,
    cfg: LlamaConfig,
    drafter: Drafter,
    stop_ids: Array,
    state: DecodeState,
    passes: Array,
    drafter_params: Any = None,
    mesh: Mesh | None = None,
    width_index: int | None = None,
) -> DecodeState:
    """Runs `step` until every row is done, the next step might not fit into S, or `passes` (int32 []) steps are done.

    The state is donated: its buffers are updated in place. `width_index` says which of the drafter's widths every step
    runs; None leaves the choice to `state.policy`, if there are several.
    """
    if width_index is not None:
        smaller = drafter.first(width_index)
        narrow = state.replace(draft=_fit_draft(state.draft, smaller.tree))
        after = decode(params, cfg, smaller, stop_ids, narrow, passes, drafter_params, mesh)
        new_passes = (after.forward_passes - state.forward_passes)[:, None]
        is_width = (jnp.arange(len(drafter.widths)) == width_index)[None, :]
        counts = state.passes_by_width + jnp.where(is_width, new_passes, 0)
        after = after.replace(draft=_fit_draft(after.draft, drafter.tree), passes_by_width=counts)
        return _constrain(after, mesh)
    most_emitted = drafter.tree.max_depth + 1

    def unfinished(carry: tuple[DecodeState, Array]) -> Array:
        state, passes_left = carry
        any_unfinished = jnp.any(~state.done)
        fits = jnp.max(state.lengths) + most_emitted <= state.capacity
        return any_unfinished & fits & (passes_left > 0)

    def body(carry: tuple[DecodeState, Array]) -> tuple[DecodeState, Array]:
        state, passes_left = carry
        return step(params, cfg, drafter, stop_ids, state, drafter_params), passes_left - 1

    state, _ = jax.lax.while_loop(unfinished, body, (state, passes))
    return _constrain(state, mesh)


def _fit_draft(draft: DraftTable, tree: TokenTree) -> DraftTable:
    """The draft table, truncated or padded with `NO_DRAFT` to the positions and ranks that `tree` uses."""
    kept = draft.predictions[:, : tree.max_depth, : tree.num_predictions]
    missing = ((0, 0), (0, tree.max_depth - kept.shape[1]), (0, tree.num_predictions - kept.shape[2]))
    return DraftTable(jnp.pad(kept, missing, constant_values=NO_DRAFT))


@functools.partial(jax.jit, static_argnames=("drafter", "capacity", "mesh"))
def grow(drafter: Drafter, state: DecodeState, capacity: int, mesh: Mesh | None = None) -> DecodeState:
    """The same state with capacity for sequences of `capacity` tokens."""
    extra = ((0, 0), (0, capacity - state.capacity))
    state = state.replace(
        tokens=jnp.pad(state.tokens, extra),
        accept_lengths=jnp.pad(state.accept_lengths, extra),
        cache=caches.resize(state.cache, capacity),
        draft=drafter.grow(state.draft, capacity),
    )
    return _constrain(state, mesh)


def _constrain(state: DecodeState, mesh: Mesh | None) -> DecodeState:
    """Constrains the state to be sharded by rows, and the cache also by heads, so that `decode` compiles only once."""
    if mesh is None:
        return state
    cache = caches.constrain(state.cache, mesh)
    policy = jax.tree.map(lambda leaf: sharding.constrain(leaf, (), mesh, sharding.DECODE_RULES), state.policy)
    state = state.replace(policy=None)
    state = jax.tree.map(lambda leaf: sharding.constrain(leaf, ("batch",), mesh, sharding.DECODE_RULES), state)
    return state.replace(cache=cache, policy=policy)


def _write(rows: Array, values: Array, start: Array) -> Array:
    """Rows [B, S] with values [B, n] written from position start [B] on."""
    return jax.vmap(lambda row, value, at: jax.lax.dynamic_update_slice(row, value, (at,)))(rows, values, start)
