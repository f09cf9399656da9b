"""The training loss (paper section 3.1): how well the model says the labels of what it reads.

Cross-entropy goes over the tokens in chunks, because the logits [B, T, V] of a whole batch would be the largest array
of a step.
"""

import jax
import jax.numpy as jnp
import optax
from jax import Array

from msn_jax import llama
from msn_jax.config import Config, LlamaConfig
from msn_jax.noise import Reading


def score(params: dict, cfg: Config, reading: Reading) -> tuple[Array, Array]:
    """How well the model says the labels of what it reads: losses, and whether its best token is the label, float32
    [B, R] each. They count where `reading.is_label`.
    """
    model = llama.Llama(cfg.model, stacked=True, remat=cfg.train.remat)
    output = model.apply({"params": params}, reading.inputs, reading.positions, reading.mask, None)
    return chunked_cross_entropy(params, cfg.model, output.hidden, reading.labels, cfg.train.loss_chunk)


def chunked_cross_entropy(
    params: dict, cfg: LlamaConfig, hidden: Array, labels: Array, chunk: int
) -> tuple[Array, Array]:
    """Cross-entropy and correctness [B, T], float32, of hidden states [B, T, D] and labels int32 [B, T].

    The logits of about `chunk` tokens exist at a time, in the backward pass too. A chunk is a slice of columns of all
    rows, so that every device works on every chunk.
    """
    B, T, D = hidden.shape
    columns = min(max(chunk // B, 1), T)
    count = -(-T // columns)
    padding = count * columns - T
    hidden = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0))).reshape(B, count, columns, D).swapaxes(0, 1)
    labels = jnp.pad(labels, ((0, 0), (0, padding))).reshape(B, count, columns).swapaxes(0, 1)

    @jax.checkpoint
    def one_chunk(inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        hidden, labels = inputs
        logits = llama.unembed(params, cfg, hidden)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses, (jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32)

    results = jax.lax.map(one_chunk, (hidden, labels))
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(B, count * columns)[:, :T], results)


def by_offset(noise_offset: Array, length: int) -> Array:
    """bool [B, T, length]: where the input is noise of offset 1, 2, ..."""
    return noise_offset[..., None] == jnp.arange(1, length + 1)[None, None, :]


def mean(values: Array, where: Array, axis: tuple[int, ...] | None = None) -> Array:
    """Mean of `values` where `where`; NaN where that is nowhere."""
    total = jnp.sum(jnp.broadcast_to(values, where.shape), axis=axis, where=where)
    return total / jnp.sum(where, axis=axis, dtype=jnp.float32)
