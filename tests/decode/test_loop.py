"""The loop against its judge: whatever drafts, the text is that of autoregressive decoding, token for token."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from msn_jax import cache as caches
from msn_jax import llama, masks
from msn_jax.decode import drafters, loop, tree
from msn_jax.decode.drafters import Drafter
from msn_jax.decode.loop import DecodeState
from msn_jax.decode.tree import JACOBI, NOISE, RETRIEVAL, RETRIEVAL_OR_JACOBI

pytestmark = pytest.mark.usefixtures("quick_compilation")

STOP = jnp.array([3, 5], jnp.int32)
FOREVER = jnp.int32(10_000)


def random_tree(rng: np.random.Generator, width: int) -> tree.TokenTree:
    nodes = []
    for node in range(1, width):
        source = int(rng.choice([JACOBI, JACOBI, RETRIEVAL, NOISE, RETRIEVAL_OR_JACOBI]))
        nodes.append((int(rng.integers(0, node)), source, 0 if source == NOISE else int(rng.integers(0, 3))))
    return tree.build(nodes)


RNG = np.random.default_rng(7)
DRAFTERS = [
    drafters.get("jacobi"),
    drafters.get("prompt_lookup"),
    drafters.get("tr_jacobi"),
    *(drafters.self_drafter(f"random tree {i}", random_tree(RNG, 3 + 6 * i)) for i in range(3)),
]
# The sliding window is shorter than the texts, and than some trees are deep.
ALL_FEATURES = dataclasses.replace(
    tiny.config(vocab_size=40, n_kv_heads=4),
    rope_scaling="linear",
    rope_factor=2.0,
    sliding_window=3,
    qkv_bias=True,
    qk_norm=True,
)


def start(cfg, params, drafter: Drafter, prompts, max_new, capacity=128, temperature=0.0, chunk=8, weights=None):
    """Prefill. `max_new` is a number per row."""
    tokens = np.zeros((len(prompts), capacity), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    sampler = tiny.sampler(len(prompts), temperature)
    limits = lengths + np.asarray(max_new, np.int32)
    return loop.prefill(params, cfg, drafter, tokens, lengths, limits, sampler, chunk, weights)


def texts(state: DecodeState) -> list[list[int]]:
    tokens, lengths = np.asarray(state.tokens), np.asarray(state.lengths)
    return [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)]


def run(cfg, params, drafter: Drafter, prompts, max_new, temperature=0.0, weights=None) -> DecodeState:
    state = start(cfg, params, drafter, prompts, max_new, temperature=temperature, weights=weights)
    return loop.decode(params, cfg, drafter, STOP, state, FOREVER, weights)


def check_accounts(state: DecodeState, prompts, max_new) -> None:
    """What every finished state satisfies, whoever drafted."""
    for row, (text, prompt) in enumerate(zip(texts(state), prompts, strict=True)):
        new = text[len(prompt) :]
        stops = [i for i, token in enumerate(new) if token in STOP.tolist()]
        assert text[: len(prompt)] == prompt
        assert 1 <= len(new) <= max_new[row]
        assert stops in ([], [len(new) - 1])  # nothing behind the first stop token
        assert stops or len(new) == max_new[row]
        accept_lengths = state.accept_lengths[row, : state.forward_passes[row]].tolist()
        assert sum(accept_lengths) == len(new)
        assert min(accept_lengths) >= 1
    assert state.done.all()
    assert (state.cache.lengths == state.lengths - 1).all()


@pytest.mark.parametrize("cfg", [tiny.config(), ALL_FEATURES], ids=["gqa", "mha, all features"])
def test_every_drafter_equals_autoregressive(cfg):
    """2 shapes x 3 models x 6 drafters x 16 prompts: 576 greedy texts; a fourth model adds 192 sampled ones."""
    rng = np.random.default_rng(0)
    fewer_passes = compared = 0
    for seed in range(4):
        params, prompts = tiny.params(cfg, seed), tiny.prompts(rng, 16, cfg.vocab_size)
        max_new = rng.integers(1, 60, 16)
        temperature = 0.8 if seed == 3 else 0.0
        reference = run(cfg, params, drafters.get("autoregressive"), prompts, max_new, temperature)
        check_accounts(reference, prompts, max_new)
        assert (reference.forward_passes == reference.lengths - np.array([len(p) for p in prompts])).all()
        for drafter in DRAFTERS:
            state = run(cfg, params, drafter, prompts, max_new, temperature)
            assert texts(state) == texts(reference), drafter.name
            check_accounts(state, prompts, max_new)
            fewer_passes += int((reference.forward_passes - state.forward_passes).sum())
            compared += len(prompts)
    assert compared == 384
    assert fewer_passes > 300  # the drafts were not all wrong, or nothing would have been tested


def test_the_while_loop_is_a_python_loop():
    cfg, params = tiny.config(), tiny.params(tiny.config(), 0)
    drafter = drafters.get("tr_jacobi")
    prompts = tiny.prompts(np.random.default_rng(3), 5, cfg.vocab_size)
    step = jax.jit(functools.partial(loop.step, params, cfg, drafter, STOP))
    state = start(cfg, params, drafter, prompts, [30] * 5)
    while not state.done.all():
        state = step(state)
    expected = run(cfg, params, drafter, prompts, [30] * 5)
    for ours, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        if not jnp.issubdtype(ours.dtype, jax.dtypes.prng_key):
            assert (ours == theirs).all()


def test_chunks_of_a_prompt_change_nothing():
    cfg, drafter = tiny.config(), drafters.get("jacobi")
    params = tiny.params(cfg, 0)
    prompts = [np.arange(n) % 7 for n in (1, 2, 17, 16, 33)]
    whole, *others = (start(cfg, params, drafter, prompts, [9] * 5, capacity=64, chunk=chunk) for chunk in (64, 16, 4))
    for other in others:
        for ours, expected in zip(
            jax.tree.leaves(other.cache.layers), jax.tree.leaves(whole.cache.layers), strict=True
        ):
            for row, prompt in enumerate(prompts):
                used = (row, slice(None), slice(len(prompt) - 1))
                np.testing.assert_allclose(ours[used], expected[used], atol=1e-5)
    first, *others = (loop.decode(params, cfg, drafter, STOP, state, jnp.int32(1)) for state in (whole, *others))
    for other in others:
        np.testing.assert_array_equal(other.draft.rows, first.draft.rows)
    assert (first.draft.rows >= 0).any()
    with pytest.raises(ValueError, match="chunks of 5 tokens do not divide a capacity of 64"):
        start(cfg, params, drafter, prompts, [9] * 5, capacity=64, chunk=5)


@pytest.mark.parametrize("drafter", DRAFTERS[1:3], ids=lambda drafter: drafter.name)
def test_a_prefill_with_room_is_one_that_has_grown(drafter):
    cfg, prompts = tiny.config(), tiny.prompts(np.random.default_rng(5), 3, 64, longest=8)
    params = tiny.params(cfg, 0)
    small = start(cfg, params, drafter, prompts, [9] * 3, capacity=16)
    tokens, sampler = np.asarray(small.tokens), tiny.sampler(3, 0.0)
    arguments = (tokens, np.asarray(small.lengths), np.asarray(small.limits), sampler, 8)
    roomy = loop.prefill(params, cfg, drafter, *arguments, capacity=64)
    for ours, theirs in zip(jax.tree.leaves(roomy), jax.tree.leaves(loop.grow(drafter, small, 64)), strict=True):
        if not jnp.issubdtype(ours.dtype, jax.dtypes.prng_key):
            np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_in_pieces_and_grown_is_the_same():
    cfg = dataclasses.replace(tiny.config(vocab_size=40), n_layers=5)  # with writes that wait (`cache.commit`)
    params, drafter = tiny.params(cfg, 1), drafters.get("tr_jacobi")
    prompts = tiny.prompts(np.random.default_rng(4), 4, cfg.vocab_size, longest=8)
    expected = run(cfg, params, drafter, prompts, [100] * 4)
    state = start(cfg, params, drafter, prompts, [100] * 4, capacity=16)
    growths = 0
    while not state.done.all():
        before = int(state.forward_passes.max())
        state = loop.decode(params, cfg, drafter, STOP, state, jnp.int32(3))
        assert int(state.forward_passes.max()) - before <= 3
        if int(state.lengths.max()) + drafter.tree.max_depth + 1 > state.capacity:
            state, growths = loop.grow(drafter, state, 2 * state.capacity), growths + 1
    assert growths >= 2
    assert texts(state) == texts(expected)


def test_a_row_does_not_depend_on_its_neighbours():
    cfg, params = tiny.config(), tiny.params(tiny.config(), 2)
    drafter = drafters.get("tr_jacobi")
    prompts = tiny.prompts(np.random.default_rng(5), 6, cfg.vocab_size)
    together = texts(run(cfg, params, drafter, prompts, [40] * 6))
    backwards = texts(run(cfg, params, drafter, prompts[::-1], [40] * 6))
    alone = [texts(run(cfg, params, drafter, [prompt], [40]))[0] for prompt in prompts]
    assert together == backwards[::-1] == alone


def test_the_passes_of_a_row_do_not_depend_on_its_neighbours():
    cfg, params = tiny.config(), tiny.params(tiny.config(), 2)
    prompts = tiny.prompts(np.random.default_rng(5), 6, cfg.vocab_size)
    together = run(cfg, params, drafters.get("jacobi"), prompts, [40] * 6)
    alone = [int(run(cfg, params, drafters.get("jacobi"), [prompt], [40]).forward_passes[0]) for prompt in prompts]
    assert together.forward_passes.tolist() == alone


def test_node_logits_are_those_of_the_path_alone():
    cfg, params = tiny.config(), tiny.params(tiny.config(), 0)
    forward = jax.jit(lambda params, *args: llama.forward(params, cfg, *args))
    rng = np.random.default_rng(6)
    for token_tree in (drafters.get("tr_jacobi").tree, random_tree(rng, 14)):
        text = jnp.asarray(rng.integers(0, cfg.vocab_size, (2, 9)), jnp.int32)
        index = jnp.broadcast_to(jnp.arange(9, dtype=jnp.int32)[None, :], (2, 9))
        prefix = forward(params, text, index, masks.causal(9))
        cache = caches.commit(caches.create(cfg, 2, 16), prefix.kv, index, jnp.array([9, 6], jnp.int32))
        nodes = jnp.asarray(rng.integers(0, cfg.vocab_size, (2, token_tree.width)), jnp.int32)
        positions = cache.lengths[:, None] + jnp.asarray(token_tree.depth)[None, :]
        tree_hidden = forward(params, nodes, positions, jnp.asarray(token_tree.mask), cache).hidden
        for row in range(2):
            for node in range(token_tree.width):
                path = token_tree.paths[node, : token_tree.depth[node] + 1]
                length = int(cache.lengths[row]) + len(path)
                alone = jnp.zeros((1, 16), jnp.int32)  # padding behind a text changes nothing of it
                alone = alone.at[0, :length].set(jnp.concatenate([text[row, : cache.lengths[row]], nodes[row, path]]))
                hidden = forward(params, alone, jnp.arange(16, dtype=jnp.int32)[None, :], masks.causal(16)).hidden
                np.testing.assert_allclose(tree_hidden[row, node], hidden[0, length - 1], atol=2e-5)


def test_a_finished_row_costs_and_changes_nothing():
    cfg, params = tiny.config(), tiny.params(tiny.config(), 0)
    state = run(cfg, params, drafters.get("jacobi"), [[1, 2, 4], [4] * 20], [1, 50])
    assert state.forward_passes[0] == 1
    assert state.lengths[0] == 4
