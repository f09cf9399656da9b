"""Runs prefill and the decode loop on a batch of prompts, without a session, a tokenizer or requests."""

import jax.numpy as jnp
import numpy as np
import tiny

from msn_jax.config import LlamaConfig
from msn_jax.decode import loop
from msn_jax.decode.drafters import Drafter
from msn_jax.decode.loop import DecodeState
from msn_jax.decode.verify import Sampler

STOP = jnp.array([3, 5], jnp.int32)  # stop tokens
UNLIMITED = jnp.int32(10_000)  # forward passes: more than any row needs


def start(
    cfg: LlamaConfig,
    params: dict,
    drafter: Drafter,
    prompts: list[list[int]],
    max_new: np.ndarray | list[int],
    capacity: int = 128,
    sampler: Sampler | None = None,
    chunk: int = 8,
    drafter_params: dict | None = None,
) -> DecodeState:
    """Prefill. `max_new` has one number per row, `drafter_params` are the draft model's; greedy without a sampler."""
    tokens = np.zeros((len(prompts), capacity), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    limits = lengths + np.asarray(max_new, np.int32)
    sampler = sampler or tiny.sampler(len(prompts))
    return loop.prefill(params, cfg, drafter, tokens, lengths, limits, sampler, chunk, drafter_params)


def run(
    cfg: LlamaConfig,
    params: dict,
    drafter: Drafter,
    prompts: list[list[int]],
    max_new: np.ndarray | list[int],
    sampler: Sampler | None = None,
    drafter_params: dict | None = None,
    capacity: int = 128,
) -> DecodeState:
    """Prefill, then decode until every row is done."""
    state = start(cfg, params, drafter, prompts, max_new, capacity, sampler, drafter_params=drafter_params)
    return loop.decode(params, cfg, drafter, STOP, state, UNLIMITED, drafter_params)


def sequences(state: DecodeState) -> list[list[int]]:
    """Prompt and new tokens of every row."""
    tokens, lengths = np.asarray(state.tokens), np.asarray(state.lengths)
    return [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)]


def check_bookkeeping(state: DecodeState, prompts: list[list[int]], max_new: np.ndarray | list[int]) -> None:
    """Invariants of every finished state, for any drafter."""
    accept_lengths, forward_passes = np.asarray(state.accept_lengths), np.asarray(state.forward_passes)
    stop_tokens = STOP.tolist()
    for row, (sequence, prompt) in enumerate(zip(sequences(state), prompts, strict=True)):
        new = sequence[len(prompt) :]
        stops = [i for i, token in enumerate(new) if token in stop_tokens]
        assert sequence[: len(prompt)] == prompt
        assert 1 <= len(new) <= max_new[row]
        assert stops in ([], [len(new) - 1])  # no token follows the first stop token
        assert stops or len(new) == max_new[row]
        emitted = accept_lengths[row, : forward_passes[row]]
        assert emitted.sum() == len(new)
        assert emitted.min() >= 1
    assert np.all(state.done)
    np.testing.assert_array_equal(state.cache.lengths, np.asarray(state.lengths) - 1)
