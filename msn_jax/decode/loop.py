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

from msn_jax import cache as caches
from msn_jax import llama, masks
from msn_jax.cache import KVCache
from msn_jax.config import LlamaConfig
from msn_jax.decode import drafters
from msn_jax.decode.drafters import Drafter
from msn_jax.decode.verify import Sampler, choose, cut, verify


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


@functools.partial(jax.jit, static_argnames=("cfg", "drafter", "chunk"))
def prefill(
    params: dict,
    cfg: LlamaConfig,
    drafter: Drafter,
    prompts: Array,
    lengths: Array,
    limits: Array,
    sampler: Sampler,
    chunk: int,
) -> DecodeState:
    """Reads the prompts: everything but their last token goes into the cache.

    They are read in chunks, as many as the longest one needs, so that padding costs next to nothing and the scores of
    a long prompt never exist at once. Then the newest token and noise behind it run in one narrow pass, whose logits
    are the first draft.

    Args:
      params: decoding layout.
      cfg: the model.
      drafter: who will guess.
      prompts: int32 [B, S], padded on the right by at least the depth of the drafter's tree.
      lengths: int32 [B], at least 1.
      limits: int32 [B], length at which each row ends; a row that starts at its limit is done.
      sampler: how the model's choices are made.
      chunk: tokens read at a time; divides S.
    """
    batch_size, capacity = prompts.shape
    if capacity % chunk:
        raise ValueError(f"chunks of {chunk} tokens do not divide a capacity of {capacity}")

    def read(number: Array, cache: KVCache) -> KVCache:
        start = number * chunk
        tokens = jax.lax.dynamic_slice_in_dim(prompts, start, chunk, axis=1)
        index = jnp.broadcast_to(jnp.arange(chunk, dtype=jnp.int32)[None, :], tokens.shape)
        output = llama.forward(params, cfg, tokens, start + index, masks.causal(chunk), cache)
        return caches.commit(cache, output.kv, index, jnp.clip(lengths - 1 - start, 0, chunk))

    chunks = (jnp.max(lengths) - 2) // chunk + 1  # that hold the tokens before the newest
    cache = jax.lax.fori_loop(0, chunks, read, caches.create(cfg, batch_size, capacity))
    passes = jnp.zeros((batch_size,), jnp.int32)
    return DecodeState(
        tokens=prompts,
        lengths=lengths,
        limits=limits,
        done=lengths >= limits,
        cache=cache,
        draft=drafter.init(drafter.tree, _logits_behind(params, cfg, prompts, lengths, cache, drafter.tree.max_depth)),
        sampler=sampler,
        accept_lengths=jnp.zeros((batch_size, capacity), jnp.int32),
        forward_passes=passes,
    )


def _logits_behind(params: dict, cfg: LlamaConfig, prompts: Array, lengths: Array, cache: KVCache, depth: int) -> Array:
    """float32 logits [B, P, V] of the newest token and of noise behind it, P = `depth` in all."""
    if depth == 0:
        return jnp.zeros((len(lengths), 0, cfg.vocab_size), jnp.float32)
    newest = jnp.take_along_axis(prompts, lengths[:, None] - 1, axis=1)
    noise = drafters.ahead_noise(jnp.zeros_like(lengths), prompts, lengths, depth)
    steps = jnp.arange(depth, dtype=jnp.int32)[None, :]
    tokens = jnp.where(steps == 0, newest, noise)
    hidden = llama.forward(params, cfg, tokens, lengths[:, None] - 1 + steps, masks.causal(depth), cache).hidden
    return llama.unembed(params, cfg, hidden)


def step(params: dict, cfg: LlamaConfig, drafter: Drafter, stop_ids: Array, state: DecodeState) -> DecodeState:
    """One pass: every unfinished row gains between 1 and P + 1 tokens. Pure; `stop_ids` is int32 [E]."""
    tree = drafter.tree
    node_tokens = drafter.propose(tree, state.draft, state.tokens, state.lengths, state.forward_passes + 1)
    positions = state.lengths[:, None] - 1 + jnp.asarray(tree.depth)[None, :]
    output = llama.forward(params, cfg, node_tokens, positions, jnp.asarray(tree.mask), state.cache)
    logits = llama.unembed(params, cfg, output.hidden)

    verified = verify(tree, node_tokens, choose(logits, positions, state.sampler))
    is_stop = jnp.any(verified.emitted[:, :, None] == stop_ids[None, None, :], axis=-1)
    verified = cut(verified, is_stop, room=jnp.where(state.done, 0, state.limits - state.lengths))

    emitted = jnp.arange(is_stop.shape[1], dtype=jnp.int32)[None, :] < verified.count[:, None]
    lengths = state.lengths + verified.count
    return state.replace(
        tokens=_write(state.tokens, verified.emitted, state.lengths),
        lengths=lengths,
        done=state.done | jnp.any(is_stop & emitted, axis=-1) | (lengths >= state.limits),
        cache=caches.commit(state.cache, output.kv, verified.path, verified.count),
        draft=drafter.update(tree, state.draft, verified, logits),
        accept_lengths=_write(state.accept_lengths, verified.count[:, None], state.forward_passes),
        forward_passes=state.forward_passes + (~state.done).astype(jnp.int32),
    )


@functools.partial(jax.jit, static_argnames=("cfg", "drafter"), donate_argnames="state")
def decode(
    params: dict, cfg: LlamaConfig, drafter: Drafter, stop_ids: Array, state: DecodeState, passes: Array
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
        return step(params, cfg, drafter, stop_ids, state), passes_left - 1

    state, _ = jax.lax.while_loop(unfinished, body, (state, passes))
    return state


@functools.partial(jax.jit, static_argnames="capacity")
def grow(state: DecodeState, capacity: int) -> DecodeState:
    """The same state with room for texts of `capacity` tokens."""
    extra = ((0, 0), (0, capacity - state.capacity))
    return state.replace(
        tokens=jnp.pad(state.tokens, extra),
        accept_lengths=jnp.pad(state.accept_lengths, extra),
        cache=caches.grow(state.cache, capacity),
    )


def _write(rows: Array, values: Array, start: Array) -> Array:
    """rows [B, S] with values [B, P] from start [B] on."""
    return jax.vmap(lambda row, value, at: jax.lax.dynamic_update_slice(row, value, (at,)))(rows, values, start)
