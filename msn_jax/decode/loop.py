"""Self-parallel decoding: the idea, part two (paper sections 3.2 and 3.3).

One pass of the loop, for every row of the batch at once:

    propose   fill the static token tree with guesses for the next tokens
    forward   run all its nodes in one pass, each seeing the committed text and its own ancestors
    verify    walk down the path of guesses that the model itself would have made; add its next choice (the bonus)
    commit    append the keys and values of the accepted nodes to the cache: the only write
    update    read the next guesses off the logits behind the rejected ones

    text     def area(w, h): return          newest token, not in the cache yet: `return`
    tree     return ─ w ─ * ─ w ─ <eos>      guesses of the last pass
    choices           w   *   h   *          the model's choice after each node
    emitted           w   *   h              two right guesses and the bonus: three tokens in one pass
    draft                         *          the choice behind the wrong `w` is a guess for the place after `h`

Every emitted token is the model's own choice given exactly the text before it, so the output is that of
autoregressive decoding, token for token. `autoregressive` is the same loop over a tree that is just the root.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array
from jax.sharding import Mesh

from msn_jax import cache as caches
from msn_jax import llama
from msn_jax.cache import KVCache
from msn_jax.config import LlamaConfig
from msn_jax.decode.drafters import Drafter
from msn_jax.decode.prompts import Prompt, read
from msn_jax.decode.verify import Sampler, best_tokens, cut, verify
from msn_jax.decode.verify import scores as scores_of


@struct.dataclass
class DecodeState:
    """What the loop carries. B rows, each with its own length, limit and end."""

    tokens: Array  # int32 [B, S], prompt and answer; entries from `lengths` on are leftovers
    lengths: Array  # int32 [B], tokens so far; the newest one is not in the cache yet
    limits: Array  # int32 [B], the length at which a row ends
    done: Array  # bool [B]
    cache: KVCache  # of S slots; `cache.lengths == lengths - 1`
    draft: Any  # the drafter's own state
    sampler: Sampler
    accept_lengths: Array  # int32 [B, S], tokens emitted by each pass of a row
    forward_passes: Array  # int32 [B]

    @property
    def capacity(self) -> int:
        """S: the longest text that fits without growing."""
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
    weights: Any = None,
    cache: KVCache | None = None,
    mesh: Mesh | None = None,
    capacity: int | None = None,
) -> DecodeState:
    """Reads the prompts: everything but their last tokens goes into the cache (`prompts.read`). The last token is the
    root of the first tree: its logits verify right away what the prompt's own n-grams have drafted. To run it before,
    with noise behind it, for a first draft would cost a pass that emits nothing.

    Args:
      params: decoding layout.
      cfg: the model.
      drafter: who will guess.
      prompts: int32 [B, S], padded on the right.
      lengths: int32 [B], at least 1.
      limits: int32 [B], length at which each row ends; a row that starts at its limit is done.
      sampler: how the model's choices are made.
      chunk: tokens read at a time; divides S.
      weights: the drafter's own.
      cache: what is known of the prompts already, see `prompts.read`; None is nothing.
      mesh: of the parameters, where they lie on more than one device.
      capacity: of the state, at least S, which is the default: prompts are read without the room for their answers.
    """
    if cache is None:
        cache = caches.create(cfg, *prompts.shape, mesh)
    cache = read(params, cfg, prompts, lengths, cache, chunk)
    state = DecodeState(
        tokens=prompts,
        lengths=lengths,
        limits=limits,
        done=lengths >= limits,
        cache=cache,
        draft=drafter.init(drafter, weights, Prompt(prompts, lengths, chunk)),
        sampler=sampler,
        accept_lengths=jnp.zeros(prompts.shape, jnp.int32),
        forward_passes=jnp.zeros_like(lengths),
    )
    return state if capacity is None else grow(drafter, state, capacity)


def step(
    params: dict, cfg: LlamaConfig, drafter: Drafter, stop_ids: Array, state: DecodeState, weights: Any = None
) -> DecodeState:
    """One pass: every unfinished row gains between 1 and P + 1 tokens. Pure; `stop_ids` is int32 [E], `weights` are
    the drafter's own.
    """
    tree = drafter.tree
    node_tokens, draft = drafter.propose(drafter, weights, state)
    positions = state.lengths[:, None] - 1 + jnp.asarray(tree.depth)[None, :]
    output = llama.forward(params, cfg, node_tokens, positions, jnp.asarray(tree.mask), state.cache)
    scores = scores_of(llama.unembed(params, cfg, output.hidden), positions, state.sampler)

    verified = verify(tree, node_tokens, best_tokens(scores))
    is_stop = jnp.any(verified.emitted[:, :, None] == stop_ids[None, None, :], axis=-1)
    verified = cut(verified, is_stop, room=jnp.where(state.done, 0, state.limits - state.lengths))

    emitted = jnp.arange(is_stop.shape[1], dtype=jnp.int32)[None, :] < verified.count[:, None]
    lengths = state.lengths + verified.count
    return state.replace(
        tokens=_write(state.tokens, verified.emitted, state.lengths),
        lengths=lengths,
        done=state.done | jnp.any(is_stop & emitted, axis=-1) | (lengths >= state.limits),
        cache=caches.commit(state.cache, output.kv, verified.path, verified.count),
        draft=drafter.update(drafter, draft, verified, scores),
        accept_lengths=_write(state.accept_lengths, verified.count[:, None], state.forward_passes),
        forward_passes=state.forward_passes + (~state.done).astype(jnp.int32),
    )


@functools.partial(jax.jit, static_argnames=("cfg", "drafter"), donate_argnames="state")
def decode(
    params: dict,
    cfg: LlamaConfig,
    drafter: Drafter,
    stop_ids: Array,
    state: DecodeState,
    passes: Array,
    weights: Any = None,
) -> DecodeState:
    """Runs `step` until every row is done, the next pass might not fit into S, or `passes` (int32 []) are over.

    The state is donated: its buffers are updated in place.
    """
    longest = drafter.tree.max_depth + 1

    def unfinished(carry: tuple[DecodeState, Array]) -> Array:
        state, passes_left = carry
        anyone_left = jnp.any(~state.done)
        fits = jnp.max(state.lengths) + longest <= state.capacity
        return anyone_left & fits & (passes_left > 0)

    def body(carry: tuple[DecodeState, Array]) -> tuple[DecodeState, Array]:
        state, passes_left = carry
        return step(params, cfg, drafter, stop_ids, state, weights), passes_left - 1

    state, _ = jax.lax.while_loop(unfinished, body, (state, passes))
    return state


@functools.partial(jax.jit, static_argnames=("drafter", "capacity"))
def grow(drafter: Drafter, state: DecodeState, capacity: int) -> DecodeState:
    """The same state with room for texts of `capacity` tokens."""
    extra = ((0, 0), (0, capacity - state.capacity))
    return state.replace(
        tokens=jnp.pad(state.tokens, extra),
        accept_lengths=jnp.pad(state.accept_lengths, extra),
        cache=caches.resize(state.cache, capacity),
        draft=drafter.grow(state.draft, capacity),
    )


def _write(rows: Array, values: Array, start: Array) -> Array:
    """rows [B, S] with values [B, P] from start [B] on."""
    return jax.vmap(lambda row, value, at: jax.lax.dynamic_update_slice(row, value, (at,)))(rows, values, start)
