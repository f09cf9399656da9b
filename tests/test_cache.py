"""The KV cache: commits, leftovers of uncommitted slots, and resizing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from msn_jax import cache as caches
from msn_jax import llama, masks

pytestmark = pytest.mark.usefixtures("quick_compilation")

CFG = tiny.config()
DEEP = dataclasses.replace(CFG, n_layers=9)


def new_kv(key, batch_size, length, cfg=CFG):
    shape = (batch_size, cfg.n_kv_heads, length, cfg.head_dim)
    draws = jax.random.normal(key, (cfg.n_layers, 2, *shape))
    return tuple((keys, values) for keys, values in draws)


@pytest.mark.parametrize("cfg", [CFG, DEEP])
def test_commit_appends_the_path_at_the_length_of_each_row(cfg):
    cache = caches.create(cfg, batch_size=2, capacity=16)
    commit = jax.jit(caches.commit)
    kv = new_kv(jax.random.key(0), 2, 5, cfg)
    cache = commit(cache, kv, jnp.array([[0, 1, 2], [0, 3, 4]]), jnp.array([1, 3]))
    more = new_kv(jax.random.key(1), 2, 5, cfg)
    cache = commit(cache, more, jnp.array([[4, 2, 0], [1, 0, 0]]), jnp.array([2, 1]))
    np.testing.assert_array_equal(cache.lengths, [3, 4])
    leaves = [jax.tree.leaves(tree) for tree in (cache.layers, kv, more)]
    assert len(leaves[0]) == 2 * cfg.n_layers
    for slots, first, second in zip(*leaves, strict=True):
        np.testing.assert_array_equal(slots[0, :, :3], np.stack([first[0, :, 0], second[0, :, 4], second[0, :, 2]], 1))
        expected = [first[1, :, 0], first[1, :, 3], first[1, :, 4], second[1, :, 1]]
        np.testing.assert_array_equal(slots[1, :, :4], np.stack(expected, 1))


@pytest.mark.parametrize("value", [0.0, -2.0, np.nan, -np.inf])
def test_slots_are_written_independently_of_their_values(value):
    cache = caches.create(DEEP, batch_size=1, capacity=8)
    kv = jax.tree.map(lambda new: jnp.full_like(new, value), new_kv(jax.random.key(0), 1, 2, DEEP))
    cache = jax.jit(caches.commit)(cache, kv, jnp.array([[0, 1]]), jnp.array([2]))
    assert len(cache.layers) == DEEP.n_layers
    for slots in jax.tree.leaves(cache.layers):
        np.testing.assert_array_equal(slots[0, :, :, 0], [[value] * 2 + [0.0] * 6] * DEEP.n_kv_heads)


def test_at_most_eight_writes_are_independent_of_each_other():
    """XLA's CPU backend hands more than eight to its thread pool, which takes longer than the writes themselves."""
    cache, kv = caches.create(DEEP, batch_size=1, capacity=8), new_kv(jax.random.key(0), 1, 2, DEEP)
    program = jax.make_jaxpr(caches.commit)(cache, kv, jnp.array([[0, 1]]), jnp.array([2])).jaxpr
    written_before = dict.fromkeys(program.invars, 0)  # length of the longest chain of writes before a variable
    rounds = []
    for equation in program.eqns:
        inputs = (variable for variable in equation.invars if not hasattr(variable, "val"))
        num_before = max((written_before.get(variable, 0) for variable in inputs), default=0)
        if equation.primitive.name.startswith(("scatter", "dynamic_update_slice")):
            rounds.append(num_before)
            num_before += 1
        written_before |= dict.fromkeys(equation.outvars, num_before)
    assert [rounds.count(number) for number in range(4)] == [8, 8, 2, 0]


def test_forward_does_not_read_uncommitted_slots():
    params = tiny.params(CFG, 0)
    cache = caches.create(CFG, batch_size=1, capacity=16)
    cache = caches.commit(cache, new_kv(jax.random.key(1), 1, 6), jnp.arange(6)[None], jnp.array([3]))
    dirty = cache.replace(layers=jax.tree.map(lambda slots: slots.at[:, :, 3:].set(1e6), cache.layers))
    tokens, positions = jnp.array([[5, 7]]), jnp.array([[3, 4]])
    run = jax.jit(lambda cache: llama.forward(params, CFG, tokens, positions, masks.causal(2), cache).hidden)
    np.testing.assert_array_equal(run(cache), run(dirty))
    assert not np.allclose(run(cache), run(cache.replace(lengths=jnp.array([4]))))


@pytest.mark.parametrize("capacity", [16, 40, 4])
def test_resize_keeps_the_committed_prefix(capacity):
    cache = caches.create(CFG, batch_size=2, capacity=16)
    cache = caches.commit(cache, new_kv(jax.random.key(0), 2, 4), jnp.arange(4)[None].repeat(2, 0), jnp.array([4, 2]))
    resized = caches.resize(cache, capacity)
    assert resized.capacity == capacity
    np.testing.assert_array_equal(resized.lengths, cache.lengths)
    kept = min(capacity, 16)
    for old, new in zip(jax.tree.leaves(cache.layers), jax.tree.leaves(resized.layers), strict=True):
        np.testing.assert_array_equal(old[:, :, :kept], new[:, :, :kept])
