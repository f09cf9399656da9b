"""The decode loop against autoregressive decoding: every drafter gives the same tokens."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from run_loop import STOP, check_bookkeeping, run, sequences, start

from msn_jax import cache as caches
from msn_jax import llama, masks
from msn_jax.decode import drafters, loop, tree
from msn_jax.decode.tree import JACOBI, NOISE, RETRIEVAL, RETRIEVAL_OR_JACOBI

pytestmark = pytest.mark.usefixtures("quick_compilation")


def random_tree(rng: np.random.Generator, width: int) -> tree.TokenTree:
    return tree.build(tiny.random_nodes(rng, width, [JACOBI, JACOBI, RETRIEVAL, NOISE, RETRIEVAL_OR_JACOBI]))


RNG = np.random.default_rng(7)
DRAFTERS = [
    drafters.get("jacobi"),
    drafters.get("prompt_lookup"),
    drafters.get("tr_jacobi"),
    *(drafters.self_drafter(f"random tree {i}", random_tree(RNG, 3 + 6 * i)) for i in range(3)),
]
# The sliding window is shorter than the sequences, and shorter than some trees are deep.
ALL_FEATURES = dataclasses.replace(
    tiny.config(vocab_size=40, n_kv_heads=4),
    rope_scaling="linear",
    rope_factor=2.0,
    sliding_window=3,
    qkv_bias=True,
    qk_norm=True,
)


@pytest.mark.parametrize("cfg", [tiny.config(), ALL_FEATURES], ids=["gqa", "mha, all features"])
def test_every_drafter_equals_autoregressive(cfg):
    """2 shapes x 3 models x 6 drafters x 16 prompts: 576 greedy sequences; a fourth model adds 192 sampled ones."""
    rng = np.random.default_rng(0)
    fewer_passes = compared = 0
    for seed in range(4):
        params, prompts = tiny.params(cfg, seed), tiny.prompts(rng, 16, cfg.vocab_size)
        max_new = rng.integers(1, 60, 16)
        sampler = tiny.sampler(16, 0.8 if seed == 3 else 0.0)
        reference = run(cfg, params, drafters.get("autoregressive"), prompts, max_new, sampler)
        check_bookkeeping(reference, prompts, max_new)
        num_new = np.asarray(reference.lengths) - [len(prompt) for prompt in prompts]
        np.testing.assert_array_equal(reference.forward_passes, num_new)
        for drafter in DRAFTERS:
            state = run(cfg, params, drafter, prompts, max_new, sampler)
            assert sequences(state) == sequences(reference), drafter.name
            check_bookkeeping(state, prompts, max_new)
            fewer_passes += int((num_new - state.forward_passes).sum())
            compared += len(prompts)
    assert compared == 384
    assert fewer_passes > 300  # some drafts are accepted; otherwise acceptance would go untested


def test_while_loop_equals_python_loop():
    cfg, params = tiny.config(), tiny.params(tiny.config(), 0)
    drafter = drafters.get("tr_jacobi")
    prompts = tiny.prompts(np.random.default_rng(3), 16, cfg.vocab_size)
    step = jax.jit(functools.partial(loop.step, params, cfg, drafter, STOP))
    state = start(cfg, params, drafter, prompts, [30] * 16)
    while not state.done.all():
        state = step(state)
    expected = run(cfg, params, drafter, prompts, [30] * 16)
    for ours, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        if not jnp.issubdtype(ours.dtype, jax.dtypes.prng_key):
            assert (ours == theirs).all()


def test_prefill_does_not_depend_on_the_chunk_size():
    cfg, drafter = tiny.config(), drafters.get("jacobi")
    params = tiny.params(cfg, 0)
    prompts = [np.arange(n) % 7 for n in (1, 2, 17, 16, 33)]
    whole, *others = (start(cfg, params, drafter, prompts, [9] * 5, capacity=64, chunk=chunk) for chunk in (64, 16, 4))
    for other in others:
        for ours, expected in zip(
            jax.tree.leaves(other.cache.layers), jax.tree.leaves(whole.cache.layers), strict=True
        ):
            for row, prompt in enumerate(prompts):
                committed = (row, slice(None), slice(len(prompt) - 1))
                np.testing.assert_allclose(ours[committed], expected[committed], atol=1e-5)
    first, *others = (loop.decode(params, cfg, drafter, STOP, state, jnp.int32(1)) for state in (whole, *others))
    for other in others:
        np.testing.assert_array_equal(other.draft.predictions, first.draft.predictions)
    assert (first.draft.predictions >= 0).any()
    with pytest.raises(ValueError, match="chunks of 5 tokens do not divide a capacity of 64"):
        start(cfg, params, drafter, prompts, [9] * 5, capacity=64, chunk=5)


@pytest.mark.parametrize("drafter", DRAFTERS[1:3], ids=lambda drafter: drafter.name)
def test_prefill_at_a_larger_capacity_equals_prefill_and_growth(drafter):
    cfg, prompts = tiny.config(), tiny.prompts(np.random.default_rng(5), 3, 64, longest=8)
    params = tiny.params(cfg, 0)
    small = start(cfg, params, drafter, prompts, [9] * 3, capacity=16)
    tokens, sampler = np.asarray(small.tokens), tiny.sampler(3, 0.0)
    arguments = (tokens, np.asarray(small.lengths), np.asarray(small.limits), sampler, 8)
    large = loop.prefill(params, cfg, drafter, *arguments, capacity=64)
    for ours, theirs in zip(jax.tree.leaves(large), jax.tree.leaves(loop.grow(drafter, small, 64)), strict=True):
        if not jnp.issubdtype(ours.dtype, jax.dtypes.prng_key):
            np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_decoding_in_steps_with_growth_equals_one_run():
    cfg = tiny.config(vocab_size=40, n_layers=5)  # enough that `cache.commit` orders its writes
    params, drafter = tiny.params(cfg, 1), drafters.get("tr_jacobi")
    prompts = tiny.prompts(np.random.default_rng(4), 4, cfg.vocab_size, longest=8)
    expected = run(cfg, params, drafter, prompts, [100] * 4)
    state = start(cfg, params, drafter, prompts, [100] * 4, capacity=32)
    growths = 0
    while not state.done.all():
        before = int(state.forward_passes.max())
        state = loop.decode(params, cfg, drafter, STOP, state, jnp.int32(3))
        assert int(state.forward_passes.max()) - before <= 3
        if int(state.lengths.max()) + drafter.tree.max_depth + 1 > state.capacity:
            state, growths = loop.grow(drafter, state, 2 * state.capacity), growths + 1
    assert growths >= 2
    assert sequences(state) == sequences(expected)


def test_tokens_of_a_row_do_not_depend_on_other_rows():
    cfg, params = tiny.config(), tiny.params(tiny.config(), 2)
    drafter = drafters.get("tr_jacobi")
    prompts = tiny.prompts(np.random.default_rng(5), 16, cfg.vocab_size)
    together = sequences(run(cfg, params, drafter, prompts, [40] * 16))
    reversed_rows = sequences(run(cfg, params, drafter, prompts[::-1], [40] * 16))
    alone = [sequences(run(cfg, params, drafter, [prompt], [40]))[0] for prompt in prompts]
    assert together == reversed_rows[::-1] == alone


def test_forward_passes_of_a_row_do_not_depend_on_other_rows():
    cfg, params = tiny.config(), tiny.params(tiny.config(), 2)
    prompts = tiny.prompts(np.random.default_rng(5), 16, cfg.vocab_size)
    together = run(cfg, params, drafters.get("jacobi"), prompts, [40] * 16)
    alone = [int(run(cfg, params, drafters.get("jacobi"), [prompt], [40]).forward_passes[0]) for prompt in prompts]
    assert together.forward_passes.tolist() == alone


def test_node_hidden_states_equal_those_of_the_path_alone():
    cfg, params = tiny.config(), tiny.params(tiny.config(), 0)
    forward = jax.jit(lambda params, *args: llama.forward(params, cfg, *args))
    rng = np.random.default_rng(6)
    for token_tree in (drafters.get("tr_jacobi").tree, random_tree(rng, 14)):
        prompt = rng.integers(0, cfg.vocab_size, (2, 9), np.int32)
        index = np.tile(np.arange(9, dtype=np.int32), (2, 1))
        prefix = forward(params, prompt, index, masks.causal(9))
        cache = jax.jit(caches.commit)(caches.create(cfg, 2, 16), prefix.kv, index, np.array([9, 6], np.int32))
        nodes = rng.integers(0, cfg.vocab_size, (2, token_tree.width), np.int32)
        positions = cache.lengths[:, None] + token_tree.depth[None, :]
        tree_hidden = np.asarray(forward(params, nodes, positions, token_tree.mask, cache).hidden)
        for row in range(2):
            for node in range(token_tree.width):
                path = token_tree.paths[node, : token_tree.depth[node] + 1]
                length = int(cache.lengths[row]) + len(path)
                alone = np.zeros((1, 16), np.int32)  # padding after a sequence does not change it
                alone[0, :length] = np.concatenate([prompt[row, : length - len(path)], nodes[row, path]])
                hidden = forward(params, alone, np.arange(16, dtype=np.int32)[None, :], masks.causal(16)).hidden
                np.testing.assert_allclose(tree_hidden[row, node], np.asarray(hidden)[0, length - 1], atol=2e-5)


def test_a_finished_row_does_no_forward_passes_and_stays_unchanged():
    cfg, params = tiny.config(), tiny.params(tiny.config(), 0)
    state = run(cfg, params, drafters.get("jacobi"), [[1, 2, 4], [4] * 20] * 8, [1, 50] * 8)
    assert state.forward_passes[0] == 1
    assert state.lengths[0] == 4
