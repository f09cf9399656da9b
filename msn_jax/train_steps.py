"""One step of training, and one of evaluation: pure functions, for all parameters or for those of an adapter."""

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import Array

from msn_jax import gated, noise, optim
from msn_jax.config import Config, NoiseConfig
from msn_jax.losses import masked_mean, offset_mask, token_losses
from msn_jax.noise import Batch, TrainingInputs
from msn_jax.redraft import redraft_inputs


@struct.dataclass
class TrainState:
    """The state that a training step updates."""

    step: Array  # int32 [], completed steps
    params: dict
    opt_state: optax.OptState


def train_step(
    state: TrainState,
    batch: Batch,
    frozen: dict | None = None,
    *,
    cfg: Config,
    optimizer: optax.GradientTransformation,
) -> tuple[TrainState, dict[str, Array]]:
    """One optimizer update. Pure.

    Args:
      state: before the update.
      batch: packed rows [B, T].
      frozen: the parameters of the model if the state's own are those of an adapter; else None.
      cfg: static.
      optimizer: from `optim.optimizer`; static.

    Returns:
      The next state and the step's metrics, float32: scalars, and one value per offset 1..`cfg.noise.length` for
      `noise_loss` and `noise_accuracy` (NaN where the batch has no such position).
    """
    key = jax.random.fold_in(jax.random.key(cfg.train.seed), state.step)
    if is_gated(cfg):
        return _gated_step(key, state, batch, frozen, cfg, optimizer)
    last_offset = noise.curriculum(state.step, cfg.noise)
    inputs = noise.build_inputs(key, batch, cfg.noise, cfg.model.vocab_size, last_offset)
    model, adapter = (state.params, None) if frozen is None else (frozen, state.params)
    inputs = redraft_inputs(model, cfg, inputs, adapter)
    weights = jnp.where(inputs.noise_offset > 0, cfg.noise.weight, 1.0) * inputs.loss_mask

    def loss_fn(params: dict) -> tuple[Array, tuple[Array, Array]]:
        losses, correct = _token_losses(params, frozen, cfg, inputs)
        total = jnp.sum(losses * weights)
        return total / jnp.maximum(jnp.sum(weights), 1), (losses, correct)  # a batch without response tokens has loss 0

    (loss, (losses, correct)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    at_offset = offset_mask(inputs.noise_offset, cfg.noise.length) & inputs.loss_mask[..., None]
    metrics = {
        "loss": loss,
        "clean_loss": masked_mean(losses, inputs.loss_mask & (inputs.noise_offset == 0)),
        "noise_loss": masked_mean(losses[..., None], at_offset, axis=(0, 1)),
        "noise_accuracy": masked_mean(correct[..., None], at_offset, axis=(0, 1)),
        "num_skipped_samples": jnp.sum(inputs.num_skipped_samples).astype(jnp.float32),
        "response_tokens": jnp.sum(inputs.loss_mask, dtype=jnp.float32),
    }
    return _update(state, grads, cfg, optimizer, metrics)


def _token_losses(params: dict, frozen: dict | None, cfg: Config, inputs: TrainingInputs) -> tuple[Array, Array]:
    return token_losses(params, cfg, inputs) if frozen is None else token_losses(frozen, cfg, inputs, adapter=params)


def _gated_step(
    key: Array, state: TrainState, batch: Batch, frozen: dict, cfg: Config, optimizer: optax.GradientTransformation
) -> tuple[TrainState, dict[str, Array]]:
    """`train_step` for a gated adapter. `noise_accuracy` compares with the frozen model's own predictions."""
    last_offset = noise.curriculum(state.step, cfg.noise)
    blocks = noise.draw_blocks(key, batch, cfg.noise, cfg.model.vocab_size, last_offset)

    def loss_fn(adapter: dict) -> tuple[Array, gated.BlockLosses]:
        results = gated.block_losses(adapter, frozen, cfg, batch, blocks)
        return gated.loss(results, cfg), results

    (loss, results), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    correct, count = gated.accuracy(results)
    metrics = {
        "loss": loss,
        "noise_loss": masked_mean(results.losses, results.valid, axis=(0, 1)),
        "noise_accuracy": correct / count,
        "num_skipped_samples": jnp.sum(blocks.num_skipped_samples).astype(jnp.float32),
        "block_tokens": jnp.sum(count),
    }
    return _update(state, grads, cfg, optimizer, metrics)


def _update(
    state: TrainState, grads: dict, cfg: Config, optimizer: optax.GradientTransformation, metrics: dict[str, Array]
) -> tuple[TrainState, dict[str, Array]]:
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics |= {
        "grad_norm": optax.global_norm(grads),
        "learning_rate": optim.learning_rate(cfg.optim, cfg.train.steps)(state.step),
    }
    return TrainState(state.step + 1, params, opt_state), metrics


def is_gated(cfg: Config) -> bool:
    """Whether the run trains a gated adapter."""
    return cfg.adapter.rank > 0 and cfg.adapter.gate == "noise"


def eval_step(params: dict, batch: Batch, key: Array, frozen: dict | None = None, *, cfg: Config) -> dict[str, Array]:
    """Sums over one batch: loss on clean inputs, and correct predictions at noise offsets 1..length.

    The noise is always one segment of ahead noise per sample, whatever `cfg.noise`, so that SFT and MSN are comparable.
    """
    clean = noise.clean_inputs(batch)
    if is_gated(cfg):  # the clean loss is that of the frozen model; the noise is that of the training
        losses, _ = token_losses(frozen, cfg, clean)
        blocks = noise.draw_blocks(key, batch, cfg.noise, cfg.model.vocab_size)
        correct, count = gated.accuracy(gated.block_losses(params, frozen, cfg, batch, blocks))
        sums = {"loss": jnp.sum(losses, where=clean.loss_mask), "tokens": jnp.sum(clean.loss_mask)}
        return sums | {"correct": correct, "noise": count}
    losses, _ = _token_losses(params, frozen, cfg, clean)
    one_segment = NoiseConfig(kind="ahead", segments=1, length=cfg.noise.length)
    noisy = noise.build_inputs(key, batch, one_segment, cfg.model.vocab_size)
    _, correct = _token_losses(params, frozen, cfg, noisy)
    at_offset = offset_mask(noisy.noise_offset, cfg.noise.length) & noisy.loss_mask[..., None]
    return {
        "loss": jnp.sum(losses, where=clean.loss_mask),
        "tokens": jnp.sum(clean.loss_mask),
        "correct": jnp.sum(correct[..., None], axis=(0, 1), where=at_offset),
        "noise": jnp.sum(at_offset, axis=(0, 1)),
    }
