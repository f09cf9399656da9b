"""The training loss (paper section 3.1): cross-entropy of noisy inputs with clean labels.

It is computed in chunks of tokens, because the logits [B, T, V] of a whole batch would be the largest array of a step.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import PartitionSpec

from msn_jax import adapter as adapters
from msn_jax import llama, sharding
from msn_jax.config import Config, LlamaConfig
from msn_jax.noise import TrainingInputs


def token_losses(params: dict, cfg: Config, inputs: TrainingInputs, adapter: dict | None = None) -> tuple[Array, Array]:
    """Cross-entropy of every token, and whether its label is the top-1 prediction (0 or 1): float32 [B, R] each.

    Both are meaningful where `inputs.loss_mask`. With self-distillation the targets of noise blocks are the model's own
    predictions at the same positions of the clean row, without gradient. With an adapter, the parameters are frozen.
    """
    hidden = hidden_states(params, cfg, inputs, adapter)
    params = params if adapter is None else jax.lax.stop_gradient(params)
    cross_entropy = functools.partial(chunked_cross_entropy, params, cfg.model, chunk=cfg.train.loss_chunk)
    if inputs.teacher_positions is None or not cfg.noise.self_distillation:
        return cross_entropy(hidden, inputs.labels)
    T = inputs.labels.shape[1] - inputs.teacher_positions.shape[1]
    teacher = jnp.take_along_axis(hidden[:, :T], inputs.teacher_positions[:, :, None], axis=1)
    teacher /= jnp.asarray(cfg.noise.teacher_temperature, teacher.dtype)  # logits are linear in the hidden state
    row = cross_entropy(hidden[:, :T], inputs.labels[:, :T])
    blocks = cross_entropy(hidden[:, T:], inputs.labels[:, T:], teacher)
    return jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), row, blocks)


def hidden_states(params: dict, cfg: Config, inputs: TrainingInputs, adapter: dict | None = None) -> Array:
    """Hidden states [B, R, D] of the model, or of the frozen model with an adapter that is active at every token."""
    options = {"remat": cfg.train.remat, "unroll": cfg.train.unroll}
    arrays = inputs.input_tokens, inputs.positions, inputs.mask
    if adapter is None:
        return llama.Llama(cfg.model, **options).apply({"params": params}, *arrays)
    factors = adapters.scale(adapter, cfg.adapter)
    return llama.forward_frozen(params, cfg.model, *arrays, adapter=factors, **options)[0]


def chunked_cross_entropy(
    params: dict, cfg: LlamaConfig, hidden: Array, labels: Array, teacher: Array | None = None, *, chunk: int
) -> tuple[Array, Array]:
    """Cross-entropy and top-1 correctness, float32 [B, T] each.

    On a mesh, every device works on its own rows, with an unembedding that it gathers once. Left to the compiler, each
    chunk would gather it, and gather the logits' gradients for the unembedding's own one.

    Args:
      params: holds the unembedding.
      cfg: the model.
      hidden: [B, T, D], hidden states.
      labels: int32 [B, T].
      teacher: [B, T, D], hidden states of a teacher whose predictions replace the labels in the cross-entropy.
      chunk: tokens per device whose logits exist at a time, in the backward pass too.
    """
    name = "embed" if cfg.tie_embeddings else "unembed"
    local = functools.partial(_local_cross_entropy, cfg=cfg, chunk=chunk)
    # In float32, in which the gradients of all chunks and devices are summed.
    arguments = {name: params[name].astype(jnp.float32)}, hidden, labels, teacher
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(axis for axis in sharding.TRAIN_RULES["batch"] if mesh.shape.get(axis, 1) > 1)
    if not axes:
        return local(*arguments)
    rows = PartitionSpec(axes)
    return jax.shard_map(
        local,
        in_specs=(PartitionSpec(), rows, rows, rows),
        out_specs=(rows, rows),
        axis_names=frozenset(axes),  # the compiler divides the vocabulary over the others
        check_vma=False,
    )(*arguments)


def _local_cross_entropy(
    params: dict, hidden: Array, labels: Array, teacher: Array | None, *, cfg: LlamaConfig, chunk: int
) -> tuple[Array, Array]:
    """`chunked_cross_entropy` on one device, or of one device's rows."""

    def one_chunk(chunk: tuple[Array, Array, Array | None]) -> tuple[Array, Array]:
        hidden, labels, teacher = chunk
        logits = llama.unembed(params, cfg, hidden)
        if teacher is None:
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        else:
            targets = jax.nn.softmax(llama.unembed(params, cfg, teacher))
            losses = optax.softmax_cross_entropy(logits, jax.lax.stop_gradient(targets))
        target_logits = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
        return losses, (target_logits >= logits.max(axis=-1)).astype(jnp.float32)

    return map_chunks(one_chunk, (hidden, labels, teacher), chunk)


def map_chunks(function: Callable, arrays: Any, chunk: int, remat: bool = True) -> Any:
    """Applies a function of [B, n, ...] arrays that returns [B, n] arrays to [B, T, ...] arrays, in chunks of columns.

    With `remat`, the backward pass recomputes each chunk, so that only one has its intermediate results in memory.
    """
    B, T = jax.tree.leaves(arrays)[0].shape[:2]
    count = -(-T // max(chunk // B, 1))
    columns = -(-T // count)  # chunks of equal size: the last one has little padding

    def in_chunks(values: Array) -> Array:
        padding = ((0, 0), (0, count * columns - T), *[(0, 0)] * (values.ndim - 2))
        return jnp.pad(values, padding).reshape(B, count, columns, *values.shape[2:]).swapaxes(0, 1)

    function = jax.checkpoint(function) if remat else function
    results = jax.lax.map(function, jax.tree.map(in_chunks, arrays))
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(B, count * columns)[:, :T], results)


def offset_mask(noise_offset: Array, length: int) -> Array:
    """bool [B, T, length]: where the input is noise at offset 1, 2, ..."""
    return noise_offset[..., None] == jnp.arange(1, length + 1)[None, None, :]


def masked_mean(values: Array, where: Array, axis: tuple[int, ...] | None = None) -> Array:
    """Mean of `values` where `where` is True; NaN if it is nowhere True."""
    total = jnp.sum(jnp.broadcast_to(values, where.shape), axis=axis, where=where)
    return total / jnp.sum(where, axis=axis, dtype=jnp.float32)
