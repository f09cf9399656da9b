"""Training of a gated adapter (`adapter.py`): the model drafts with it, and its own text stays as it is.

The clean row runs once through the frozen model, without gradients. Then the tokens of the noise blocks (`noise.py`)
run with the adapter; they attend to the keys and values of the clean tokens before their block, and to the block:

    row      def  area ( w  ,  h  ) :  return w  *  h     the frozen model: keys, values and predictions
    block                                     (  w  :     the model with the adapter
    target                                    *  h  ...   the model's own predictions at the same positions of the row

The attention masks are [B, E, T] and, within each block, [1, L, L], so the cost grows with E (T + L), not with
(T + E)^2. If blocks of kind 'drafts' are in use, all blocks run once more before, without gradients (`redraft.py`).

A draft counts only if all drafts before it are accepted. With `config.noise.acceptance_weights` the loss at offset l is
weighted by the product of the probabilities that the adapter gives to the model's predictions at offsets 1..l-1 of its
block. With `config.noise.label_targets` the targets are the next tokens of the row instead, for comparison.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from msn_jax import adapter as adapters
from msn_jax import llama, losses, masks
from msn_jax.attention import Prefix
from msn_jax.config import Config
from msn_jax.noise import Batch, Blocks
from msn_jax.redraft import redraft


@struct.dataclass
class BlockLosses:
    """Results for the tokens of the noise blocks, [B, M, L] each; meaningful where `valid`."""

    losses: Array  # float32, cross-entropy with the model's own predictions, or with the labels
    probability: Array  # float32, of the token that the model predicts from clean context
    is_correct: Array  # bool, whether that token is the top-1 prediction
    valid: Array  # bool, whether the token counts, as in `Blocks`


def block_losses(adapter: dict, params: dict, cfg: Config, batch: Batch, blocks: Blocks) -> BlockLosses:
    """Runs the row through the model and the blocks through the adapted model.

    Args:
      adapter: training layout.
      params: the frozen model, stacked layers.
      cfg: static.
      batch: packed rows [B, T].
      blocks: their noise blocks.
    """
    model, length, params = cfg.model, cfg.noise.length, jax.lax.stop_gradient(params)
    B, T = batch.tokens.shape
    options = {"remat": cfg.train.remat, "unroll": cfg.train.unroll}
    hidden, kv = llama.forward_frozen(
        params, model, batch.tokens, batch.positions, masks.Packed(batch.segment_ids), **options
    )
    index = jnp.minimum(blocks.positions_in_row(length), T - 1)
    positions = jnp.take_along_axis(batch.positions, index, axis=1)
    visible = masks.blocks_to_row(batch.segment_ids, blocks.starts, length)
    if model.sliding_window:
        visible = masks.window(visible, positions, batch.positions, model.sliding_window)
    arrays = positions, masks.causal(length), Prefix(kv, visible)

    def run_blocks(tokens: Array, adapter: dict) -> Array:
        scaled = adapters.scale(adapter, cfg.adapter)
        return llama.forward_frozen(params, model, tokens.reshape(B, -1), *arrays, scaled, **options)[0]

    tokens = blocks.tokens
    if blocks.drafted is not None:
        first = run_blocks(tokens, jax.lax.stop_gradient(adapter))
        tokens = redraft(params, cfg, first, tokens, blocks.drafted)
    drafts = run_blocks(tokens, adapter)
    teacher = jnp.take_along_axis(hidden, index[:, :, None], axis=1)
    labels = jnp.take_along_axis(batch.tokens, jnp.minimum(index + 1, T - 1), axis=1)

    def one_chunk(chunk: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        states, teacher_states, labels = chunk
        logits, teacher_logits = (llama.unembed(params, model, x) for x in (states, teacher_states))
        log_probabilities = jax.nn.log_softmax(logits)
        best = jnp.argmax(teacher_logits, axis=-1, keepdims=True)
        if cfg.noise.label_targets:
            targets = jax.nn.one_hot(labels, model.vocab_size)
        else:
            targets = jax.nn.softmax(teacher_logits / cfg.noise.teacher_temperature)
        probability = jnp.exp(jnp.take_along_axis(log_probabilities, best, axis=-1))[..., 0]
        is_correct = jnp.argmax(logits, axis=-1) == best[..., 0]
        return -jnp.sum(targets * log_probabilities, axis=-1), probability, is_correct

    results = losses.map_chunks(one_chunk, (drafts, teacher, labels), cfg.train.loss_chunk, cfg.train.remat)
    return BlockLosses(*(values.reshape(blocks.tokens.shape) for values in results), blocks.valid)


def loss(results: BlockLosses, cfg: Config) -> Array:
    """The training loss, float32 []: the weighted mean over all tokens that count."""
    weights = results.valid.astype(jnp.float32)
    if cfg.noise.acceptance_weights:
        accepted = jnp.cumprod(jax.lax.stop_gradient(results.probability), axis=-1)
        weights *= jnp.concatenate([jnp.ones_like(accepted[..., :1]), accepted[..., :-1]], axis=-1)
    return jnp.sum(results.losses * weights) / jnp.maximum(jnp.sum(weights), 1)


def accuracy(results: BlockLosses) -> tuple[Array, Array]:
    """Correct and all drafts that count, by offset: float32 [L] each."""
    correct = jnp.sum(results.is_correct, axis=(0, 1), where=results.valid, dtype=jnp.float32)
    return correct, jnp.sum(results.valid, axis=(0, 1), dtype=jnp.float32)
