"""Attention of packed rows: the kernel (interpreted) and XLA in chunks, against attention with the mask as an array."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_params
import tiny_config

from msn_jax import attention, llama, masks, packed_attention, sharding, target
from msn_jax.config import MeshConfig

pytestmark = pytest.mark.usefixtures("quick_compilation")

SHAPES = {  # B, T, K, G, H, window
    "grouped": (2, 256, 2, 3, 64, 0),
    "window": (1, 384, 1, 2, 128, 100),
}


def inputs(B, T, K, G, H, dtype=jnp.float32):
    """Queries, keys, values, segment ids of several samples and padding, and the gradient of the output."""
    keys = jax.random.split(jax.random.key(0), 5)
    q = jax.random.normal(keys[0], (B, T, K, G, H), dtype) * jnp.asarray(H**-0.5, dtype)
    own = tuple(jax.random.normal(key, (B, K, T, H), dtype) for key in keys[1:3])
    segments = jnp.sort(jax.random.randint(keys[3], (B, T), 1, 4), axis=1)
    segments = jnp.where(jnp.arange(T)[None, :] < T - T // 8, segments, 0)
    return q, own, segments, jax.random.normal(keys[4], q.shape)


def reference(q, own, segments, window):
    mask = masks.packed(segments)
    if window:
        index = jnp.arange(q.shape[1])[None, :]
        mask = masks.window(mask, index, index, window)
    return attention.attend_masked(q, own, mask, None)


def differences(function, q, own, segments, window, gradient, reference_dtype=jnp.float32):
    """The relative errors of output and gradients, as norms."""

    def values(attend, q, own):
        out, pull = jax.vjp(lambda q, own: attend(q, own, segments, window), q, own)
        return out, *jax.tree.leaves(pull(gradient.astype(out.dtype)))

    exact = values(reference, *jax.tree.map(lambda x: x.astype(reference_dtype), (q, own)))
    ours = jax.tree.map(lambda x: x.astype(jnp.float32), values(function, q, own))
    return [float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)) for a, b in zip(ours, exact, strict=True)]


def kernel(q, own, segments, window):
    return packed_attention.attend(q, own, segments, window, interpret=True)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-5), ("bfloat16", 5e-3)])
def test_the_kernel_equals_the_reference(shape, dtype, bound):
    *sizes, window = SHAPES[shape]
    q, own, segments, gradient = inputs(*sizes, dtype)
    assert max(differences(kernel, q, own, segments, window, gradient)) < bound


@pytest.mark.parametrize("length", [1024, 1100])
@pytest.mark.parametrize("window", [0, 70])
def test_chunks_equal_the_reference(length, window):
    q, own, segments, gradient = inputs(1, length, 1, 2, 16)
    assert packed_attention.attends_packed(length, "float32")
    assert max(differences(packed_attention.attend, q, own, segments, window, gradient)) < 1e-5


@pytest.mark.parametrize("length", [4096, 4100])
def test_no_array_of_all_pairs_exists(length):
    """The temporary memory of a long row, forward and backward, against one array of scores."""
    q, own, segments, gradient = inputs(1, length, 1, 2, 16)

    def loss(q, own, attend):
        return jnp.sum(attend(q, own, segments, 0) * gradient)

    sizes = []
    for attend in (packed_attention.attend, reference):
        compiled = jax.jit(jax.grad(loss), static_argnums=2).lower(q, own, attend).compile()
        sizes.append(compiled.memory_analysis().temp_size_in_bytes)
    scores = 2 * length * length * 4
    assert sizes[0] < scores / 2 < scores < sizes[1]


def test_the_kernel_on_a_mesh_equals_one_device():
    q, own, segments, _ = inputs(4, 256, 2, 2, 32)
    expected = kernel(q, own, segments, 0)
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        specs = [("batch", "head_dim", "kv_heads"), ("batch", "kv_heads"), ("batch",)]
        q_place, own_place, rows = (
            jax.sharding.NamedSharding(mesh, sharding.partition_spec(axes, sharding.TRAIN_RULES)) for axes in specs
        )
        placed = jax.device_put((q, own, segments), (q_place, (own_place,) * 2, rows))
        out = jax.jit(lambda *arguments: kernel(*arguments, 0))(*placed)
    assert out.sharding.is_equivalent_to(q_place, out.ndim)
    np.testing.assert_allclose(out, expected, atol=1e-6)


def test_programs_for_a_tpu_use_the_kernel(monkeypatch):
    assert not packed_attention.attends_packed(256, "float32")
    monkeypatch.setattr(target, "_OTHER", [])
    target.compile_for("tpu")
    assert packed_attention.attends_packed(256, "float32") and not packed_attention.attends_packed(200, "float32")
    assert not packed_attention.attends_packed(256, "float16")
    q, own, segments, _ = inputs(1, 256, 1, 1, 64)
    lowered = jax.export.export(jax.jit(lambda *a: packed_attention.attend(*a, 0)), platforms=["tpu"])(q, own, segments)
    assert "tpu_custom_call" in lowered.mlir_module()


@pytest.mark.parametrize("window", [0, 9])
def test_the_model_with_long_rows(monkeypatch, window):
    cfg = dataclasses.replace(tiny_config.get_config().model, sliding_window=window, max_length=64)
    params = random_params.stacked(cfg)
    tokens = jax.random.randint(jax.random.key(1), (2, 64), 0, cfg.vocab_size)
    segments = jnp.array([[1] * 40 + [2] * 24, [1] * 10 + [2] * 50 + [0] * 4])
    begins = jnp.maximum.accumulate(
        jnp.where(jnp.diff(segments, axis=1, prepend=0) != 0, jnp.arange(64)[None, :], 0), axis=1
    )
    positions = jnp.arange(64, dtype=jnp.int32)[None, :] - begins
    expected = llama.forward(params, cfg, tokens, positions, masks.Packed(segments)).hidden
    used = []
    attend = packed_attention.attend
    monkeypatch.setattr(packed_attention, "_LONG", 64)
    monkeypatch.setattr(packed_attention, "attend", lambda *arguments: used.append(1) or attend(*arguments))
    hidden = llama.forward(params, cfg, tokens, positions, masks.Packed(segments)).hidden
    assert used
    np.testing.assert_allclose(hidden, expected, atol=2e-5)
