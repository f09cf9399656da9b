"""Chunked cross-entropy and self-distillation against naive implementations."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_config

from msn_jax import llama, losses


@pytest.mark.parametrize("chunk", [1, 24, 30, 10_000])
def test_chunked_cross_entropy_equals_the_naive_one(chunk):
    cfg = tiny_config.get_config().model
    with jax.numpy_dtype_promotion("strict"):
        key = jax.random.key(0)
        params = {"embed": jax.random.normal(key, (cfg.vocab_size, cfg.d_model))}
        hidden = jax.random.normal(jax.random.key(1), (3, 20, cfg.d_model))
        labels = jax.random.randint(jax.random.key(2), (3, 20), 0, cfg.vocab_size)
        best, next_best = jnp.moveaxis(jax.lax.top_k(llama.unembed(params, cfg, hidden), 2)[1], -1, 0)
        labels = labels.at[0].set(best[0]).at[1].set(next_best[1])

        def naive(params, hidden):
            logits = llama.unembed(params, cfg, hidden)
            values = -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1)[..., 0]
            return values, (logits.argmax(-1) == labels).astype(jnp.float32)

        def chunked(params, hidden):
            return losses.chunked_cross_entropy(params, cfg, hidden, labels, chunk=chunk)

        def with_gradient(function):
            values, correct = jax.jit(function)(params, hidden)
            gradient = jax.jit(jax.grad(lambda *args: function(*args)[0].mean(), (0, 1)))(params, hidden)
            return values, correct, gradient

        close = functools.partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-5)
        jax.tree.map(close, with_gradient(chunked), with_gradient(naive))


@pytest.mark.parametrize("chunk", [1, 30, 10_000])
def test_distillation_equals_the_naive_loss_and_stops_the_teachers_gradient(chunk):
    cfg = tiny_config.get_config().model
    params = {"embed": jax.random.normal(jax.random.key(0), (cfg.vocab_size, cfg.d_model))}
    hidden, teacher = jax.random.normal(jax.random.key(1), (2, 3, 20, cfg.d_model))
    labels = jnp.argmax(llama.unembed(params, cfg, hidden), axis=-1).at[:, ::2].set(0)

    def mean(params, hidden, teacher):
        values, correct = losses.chunked_cross_entropy(params, cfg, hidden, labels, teacher, chunk=chunk)
        return values.mean(), (values, correct)

    (_, (values, correct)), gradients = jax.value_and_grad(mean, (0, 1, 2), has_aux=True)(params, hidden, teacher)
    target = jax.nn.softmax(llama.unembed(params, cfg, teacher))
    naive = lambda params, hidden: (  # noqa: E731
        -(target * jax.nn.log_softmax(llama.unembed(params, cfg, hidden))).sum(-1)
    )
    np.testing.assert_allclose(values, naive(params, hidden), atol=1e-4)
    expected = jax.grad(lambda *args: naive(*args).mean(), (0, 1))(params, hidden)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), gradients[:2], expected)
    assert (gradients[2] == 0).all()
    assert correct[:, 1::2].all() and correct.mean() < 0.7  # against the labels, not the teacher


def test_logits_of_the_whole_batch_are_never_materialized():
    """Compiled memory: 8 x 256 tokens with a vocabulary of 4096 have 8 M logits, a chunk of 64 tokens 0.25 M."""
    cfg = dataclasses.replace(tiny_config.get_config().model, vocab_size=4096)
    params = {"embed": jax.ShapeDtypeStruct((cfg.vocab_size, cfg.d_model), jnp.float32)}
    hidden, labels = (jax.ShapeDtypeStruct((8, 256, *rest), t) for rest, t in (((16,), jnp.float32), ((), jnp.int32)))

    def loss(params, hidden, labels):
        return losses.chunked_cross_entropy(params, cfg, hidden, labels, chunk=64)[0].mean()

    memory = jax.jit(jax.grad(loss, (0, 1))).lower(params, hidden, labels).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 8 * 256 * 4096 * 4 / 4
