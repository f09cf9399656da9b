import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_params import unstacked

from msn_jax import cache as caches
from msn_jax import llama, masks
from msn_jax.config import LlamaConfig

pytestmark = pytest.mark.usefixtures("quick_compilation")

CFG = LlamaConfig(
    vocab_size=31,
    d_model=16,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=4,
    d_mlp=24,
    max_length=64,
    rope_theta=321.0,
    rope_scaling="none",
    sliding_window=0,
    norm_eps=3e-4,
    qkv_bias=False,
    qk_norm=False,
    tie_embeddings=True,
    dtype="float32",
    param_dtype="float32",
)


def new_kv(key, batch_size, length):
    shape = (batch_size, CFG.n_kv_heads, length, CFG.head_dim)
    return tuple((jax.random.normal(jax.random.fold_in(key, i), shape),) * 2 for i in range(CFG.n_layers))


def test_commit_appends_the_path_at_each_rows_length():
    cache = caches.create(CFG, batch_size=2, capacity=16)
    kv = new_kv(jax.random.key(0), 2, 5)
    cache = caches.commit(cache, kv, jnp.array([[0, 1, 2], [0, 3, 4]]), jnp.array([1, 3]))
    more = new_kv(jax.random.key(1), 2, 5)
    cache = caches.commit(cache, more, jnp.array([[4, 2, 0], [1, 0, 0]]), jnp.array([2, 1]))
    np.testing.assert_array_equal(cache.lengths, [3, 4])
    for (keys, _), (first, _), (second, _) in zip(cache.layers, kv, more, strict=True):
        np.testing.assert_array_equal(keys[0, :, :3], np.stack([first[0, :, 0], second[0, :, 4], second[0, :, 2]], 1))
        expected = [first[1, :, 0], first[1, :, 3], first[1, :, 4], second[1, :, 1]]
        np.testing.assert_array_equal(keys[1, :, :4], np.stack(expected, 1))


def test_forward_does_not_see_leftovers():
    params = unstacked(CFG)
    cache = caches.create(CFG, batch_size=1, capacity=16)
    cache = caches.commit(cache, new_kv(jax.random.key(1), 1, 6), jnp.arange(6)[None], jnp.array([3]))
    dirty = cache.replace(layers=jax.tree.map(lambda slots: slots.at[:, :, 3:].set(1e6), cache.layers))
    tokens, positions = jnp.array([[5, 7]]), jnp.array([[3, 4]])
    run = jax.jit(lambda cache: llama.forward(params, CFG, tokens, positions, masks.causal(2), cache).hidden)
    np.testing.assert_array_equal(run(cache), run(dirty))
    assert not np.allclose(run(cache), run(cache.replace(lengths=jnp.array([4]))))


@pytest.mark.parametrize("capacity", [16, 40, 4])
def test_resize_keeps_what_is_committed(capacity):
    cache = caches.create(CFG, batch_size=2, capacity=16)
    cache = caches.commit(cache, new_kv(jax.random.key(0), 2, 4), jnp.arange(4)[None].repeat(2, 0), jnp.array([4, 2]))
    resized = caches.resize(cache, capacity)
    assert resized.capacity == capacity
    np.testing.assert_array_equal(resized.lengths, cache.lengths)
    kept = min(capacity, 16)
    for old, new in zip(jax.tree.leaves(cache.layers), jax.tree.leaves(resized.layers), strict=True):
        np.testing.assert_array_equal(old[:, :, :kept], new[:, :, :kept])
