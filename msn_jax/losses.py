"""The training loss (paper section 3.1): how well the model says the labels of what it reads.

Cross-entropy goes over the tokens in chunks, because the logits [B, T, V] of a whole batch would be the largest array
of a step.
"""

import functools

import jax
import jax.numpy as jnp
import optax
from jax import Array

from msn_jax import llama
from msn_jax.config import Config, LlamaConfig
from msn_jax.noise import Reading


def score(params: dict, cfg: Config, reading: Reading) -> tuple[Array, Array]:
    """How well the model says what it should say: losses, and whether no token is more probable than the label, float32
    [B, R] each. They count where `reading.is_label`.

    The losses are cross-entropies with the labels; under self-distillation, those of tokens beside the text are
    cross-entropies with what the model says at the same place of the text, where no gradient goes.
    """
    model = llama.Llama(cfg.model, stacked=True, remat=cfg.train.remat, unroll=cfg.train.unroll)
    hidden = model.apply({"params": params}, reading.inputs, reading.positions, reading.mask, None).hidden
    judge = functools.partial(chunked_cross_entropy, params, cfg.model, chunk=cfg.train.loss_chunk)
    if reading.teachers is None or not cfg.noise.self_distillation:
        return judge(hidden, reading.labels)
    beside = reading.labels.shape[1] - reading.teachers.shape[1]
    teacher = jnp.take_along_axis(hidden[:, :beside], reading.teachers[:, :, None], axis=1)
    teacher /= jnp.asarray(cfg.noise.teacher_temperature, teacher.dtype)  # logits are linear in it
    text = judge(hidden[:, :beside], reading.labels[:, :beside])
    noise = judge(hidden[:, beside:], reading.labels[:, beside:], teacher)
    return jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), text, noise)


def chunked_cross_entropy(
    params: dict, cfg: LlamaConfig, hidden: Array, labels: Array, teacher: Array | None = None, *, chunk: int
) -> tuple[Array, Array]:
    """Cross-entropy and correctness [B, T], float32, of hidden states [B, T, D] and labels int32 [B, T].

    The logits of about `chunk` tokens exist at a time, in the backward pass too. A chunk is a slice of columns of all
    rows, so that every device works on every chunk. With the hidden states of a teacher, [B, T, D], the cross-entropy
    is with its predictions instead of the labels.
    """
    B, T, _ = hidden.shape
    columns = min(max(chunk // B, 1), T)
    count = -(-T // columns)

    def in_chunks(values: Array) -> Array:
        padding = ((0, 0), (0, count * columns - T), *[(0, 0)] * (values.ndim - 2))
        return jnp.pad(values, padding).reshape(B, count, columns, *values.shape[2:]).swapaxes(0, 1)

    @jax.checkpoint
    def one_chunk(inputs: tuple[Array, Array, Array | None]) -> tuple[Array, Array]:
        hidden, labels, teacher = inputs
        logits = llama.unembed(params, cfg, hidden)
        if teacher is None:
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        else:
            predicted = jax.nn.softmax(llama.unembed(params, cfg, teacher))
            losses = optax.softmax_cross_entropy(logits, jax.lax.stop_gradient(predicted))
        said = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
        return losses, (said >= logits.max(axis=-1)).astype(jnp.float32)

    results = jax.lax.map(one_chunk, jax.tree.map(in_chunks, (hidden, labels, teacher)))
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(B, count * columns)[:, :T], results)


def by_offset(noise_offset: Array, length: int) -> Array:
    """bool [B, T, length]: where the input is noise of offset 1, 2, ..."""
    return noise_offset[..., None] == jnp.arange(1, length + 1)[None, None, :]


def mean(values: Array, where: Array, axis: tuple[int, ...] | None = None) -> Array:
    """Mean of `values` where `where`; NaN where that is nowhere."""
    total = jnp.sum(jnp.broadcast_to(values, where.shape), axis=axis, where=where)
    return total / jnp.sum(where, axis=axis, dtype=jnp.float32)
