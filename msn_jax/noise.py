"""Ahead noise: the idea, part one ("Make Some Noise", arXiv 2406.17404, section 3.1).

Supervised fine-tuning always conditions on correct context. Jacobi decoding does not: after the last verified token
come a few draft tokens, most of them wrong. MSN closes this gap by training on such inputs. A short segment of the
response is replaced by tokens that occurred earlier in the same sample (*ahead noise*); the labels stay clean:

    clean    def  area ( w  ,  h  ) :  return w  *  h  <eos>
    input    def  area ( w  ,  h  ) :  return (  w  :  <eos>
    labels   area (    w ,  h  )  : return w  *  h  <eos>
    offset   0    0    0 0  0  0  0 0  0      1  2  3  0

At offset 1 the model sees one wrong token and must still predict the token after the correct one (`*`), and so on:
exactly the task of a model that drafts for itself (`decode/loop.py`).

Noise inside the row has a price: every later token of the sample is trained on corrupted context, so a row can hold
only little noise. With `cfg.blocks` the row stays clean, and noise blocks are appended to it, invisible to the row:

    row      def  area ( w  ,  h  ) :  return w  *  h  <eos>
    block                                     (  w         attends to `def ... return` and itself; labels `*  h`
    block                                        :  (      attends to `def ... return w` and itself; labels `h  <eos>`

A block costs only its own few tokens and has clean context before it, as drafts do when decoding, so a row can hold
many. The row's own predictions can then be the targets (`self_distillation`): a draft is accepted if it equals the
token that the model itself predicts from clean context, so the block learns to predict that token, whatever the label.

Invariants (tests/test_noise.py): only response positions change; segments are contiguous, do not overlap and stay
inside their sample; every noise token occurs earlier in its own sample; labels never change; the result depends on
(key, row index) and not on the number of devices.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from msn_jax import masks
from msn_jax.config import NoiseConfig

_INVALID = -1.0  # score of a position where no segment may start


@struct.dataclass
class Batch:
    """Packed rows. Every array is [B, T]."""

    tokens: Array  # int32, clean
    positions: Array  # int32, restart at 0 in every sample
    segment_ids: Array  # int32, 1, 2, ... number the samples of a row; 0 is padding
    response_mask: Array  # bool, the tokens that the model learns to predict, EOS included


@struct.dataclass
class TrainingInputs:
    """Inputs and labels of one training step. R is T, or T + E with E tokens in appended noise blocks."""

    input_tokens: Array  # int32 [B, R]
    positions: Array  # int32 [B, R], within the sample
    mask: Array  # bool [B, R, R], attention mask
    labels: Array  # int32 [B, R], the clean next token
    loss_mask: Array  # bool [B, R], where the label is a response token of the same sample
    noise_offset: Array  # int32 [B, R], 1..length at noise tokens, 0 elsewhere
    num_skipped_samples: Array  # int32 [B], samples whose response is too short for noise
    teacher_positions: Array | None = None  # int32 [B, E], row position with the same label


def clean_inputs(batch: Batch) -> TrainingInputs:
    """The batch without noise."""
    following = jax.tree.map(lambda values: jnp.roll(values, -1, axis=1), batch)  # the last column is masked below
    loss_mask = following.response_mask & (following.segment_ids == batch.segment_ids) & (following.positions > 0)
    zeros = jnp.zeros_like(batch.tokens)
    mask = masks.segments(batch.segment_ids)
    return TrainingInputs(batch.tokens, batch.positions, mask, following.tokens, loss_mask, zeros, zeros[:, 0])


def build_inputs(key: Array, batch: Batch, cfg: NoiseConfig, vocab_size: int) -> TrainingInputs:
    """The batch with no noise, segments in the row, or appended blocks. Arguments as in `ahead_noise`."""
    inputs = clean_inputs(batch)
    if cfg.kind == "none":
        return inputs
    if cfg.blocks:
        return _append_blocks(inputs, batch, ahead_blocks(key, batch, cfg, vocab_size), cfg.length)
    noisy = ahead_noise(key, batch, cfg, vocab_size)
    return inputs.replace(
        input_tokens=noisy.input_tokens, noise_offset=noisy.noise_offset, num_skipped_samples=noisy.num_skipped_samples
    )


@struct.dataclass
class NoisyBatch:
    """A batch's corrupted inputs. The labels are still `batch.tokens`, shifted by one."""

    input_tokens: Array  # int32 [B, T]
    noise_offset: Array  # int32 [B, T], 1..length inside a segment, 0 elsewhere
    num_skipped_samples: Array  # int32 [B], samples too short for a segment; they stay clean


def ahead_noise(key: Array, batch: Batch, cfg: NoiseConfig, vocab_size: int) -> NoisyBatch:
    """Corrupts `cfg.segments` segments of `cfg.length` tokens in the response of every sample.

    Args:
      key: typed PRNG key of this step; row b of the batch uses `fold_in(key, b)`.
      batch: packed rows [B, T].
      cfg: kind 'ahead' draws noise from the sample's own past, 'uniform' from the vocabulary; 'none' adds none.
      vocab_size: V, only for 'uniform'.
    """
    if cfg.kind == "none":
        zeros = jnp.zeros_like(batch.tokens)
        return NoisyBatch(input_tokens=batch.tokens, noise_offset=zeros, num_skipped_samples=zeros[:, 0])

    def corrupt_row(row: Array, batch: Batch) -> NoisyBatch:
        segment_key, token_key = jax.random.split(jax.random.fold_in(key, row))
        offset, num_skipped_samples = _place_segments(segment_key, batch, cfg.segments, cfg.length)
        if cfg.kind == "ahead":
            noise = _draw_from_past(token_key, batch, offset)
        else:
            noise = jax.random.randint(token_key, offset.shape, 0, vocab_size, jnp.int32)
        return NoisyBatch(jnp.where(offset > 0, noise, batch.tokens), offset, num_skipped_samples)

    rows = jnp.arange(batch.tokens.shape[0])
    return jax.vmap(corrupt_row)(rows, batch)


@struct.dataclass
class Blocks:
    """Noise blocks: M blocks of L tokens per row."""

    tokens: Array  # int32 [B, M, L]
    starts: Array  # int32 [B, M], the row position of each block's first token
    valid: Array  # bool [B, M], False where the row has too few possible starts
    num_skipped_samples: Array  # int32 [B], samples too short for a block


def ahead_blocks(key: Array, batch: Batch, cfg: NoiseConfig, vocab_size: int) -> Blocks:
    """Draws `cfg.blocks` noise blocks per row.

    The starts are distinct and uniform over all positions where `cfg.length` response tokens and one more label follow.
    Arguments as in `ahead_noise`.
    """
    row_length = batch.tokens.shape[1]

    def blocks_of_row(row: Array, batch: Batch) -> Blocks:
        start_key, token_key = jax.random.split(jax.random.fold_in(key, row))
        is_valid = _valid_starts(batch, cfg.length + 1)  # the last noise token needs a label, too
        score = jnp.where(is_valid, jax.random.uniform(start_key, (row_length,)), _INVALID)
        best, starts = jax.lax.top_k(score, min(cfg.blocks, row_length))
        starts = starts.astype(jnp.int32)
        before = batch.positions[starts]  # tokens of the sample before the block
        if cfg.kind == "ahead":
            tokens = _draw_blocks(token_key, batch.tokens, starts, before, cfg.length)
        else:
            tokens = jax.random.randint(token_key, (len(starts), cfg.length), 0, vocab_size, jnp.int32)
        return Blocks(tokens, starts, best > _INVALID, _count_skipped_samples(batch, is_valid))

    return jax.vmap(blocks_of_row)(jnp.arange(len(batch.tokens)), batch)


def _draw_blocks(key: Array, tokens: Array, starts: Array, before: Array, length: int) -> Array:
    """One row: block tokens [M, L], each drawn uniformly from the earlier tokens of its sample and of its block."""
    blocks = jnp.zeros((len(starts), length), jnp.int32)
    for i, token_key in enumerate(jax.random.split(key, length)):
        back = jax.random.randint(token_key, starts.shape, 1, jnp.maximum(before + i, 1) + 1, jnp.int32)
        from_block = jnp.take_along_axis(blocks, jnp.clip(i - back, 0, length - 1)[:, None], axis=1)[:, 0]
        from_row = tokens[jnp.clip(starts + i - back, 0, len(tokens) - 1)]
        blocks = blocks.at[:, i].set(jnp.where(back <= i, from_block, from_row))
    return blocks


def _append_blocks(inputs: TrainingInputs, batch: Batch, blocks: Blocks, length: int) -> TrainingInputs:
    """The clean inputs with the noise blocks appended to every row."""
    B, T = batch.tokens.shape
    M = blocks.starts.shape[1]

    def row_positions(shift: int) -> Array:
        """The row index of every block token, shifted to the right: [B, M * L]."""
        index = blocks.starts[:, :, None] + (jnp.arange(length, dtype=jnp.int32) + shift)[None, None, :]
        return jnp.minimum(index, T - 1).reshape(B, M * length)

    def append(values: Array, more: Array) -> Array:
        return jnp.concatenate([values, more.reshape(B, M * length)], axis=1)

    valid = jnp.repeat(blocks.valid, length, axis=1)
    offset = jnp.tile(jnp.arange(1, length + 1, dtype=jnp.int32), M)[None, :]
    return TrainingInputs(
        input_tokens=append(inputs.input_tokens, blocks.tokens),
        positions=append(inputs.positions, jnp.take_along_axis(batch.positions, row_positions(0), axis=1)),
        mask=masks.blocks(batch.segment_ids, blocks.starts, length),
        labels=append(inputs.labels, jnp.take_along_axis(batch.tokens, row_positions(1), axis=1)),
        loss_mask=append(inputs.loss_mask, valid),
        noise_offset=append(inputs.noise_offset, jnp.where(valid, offset, 0)),
        num_skipped_samples=blocks.num_skipped_samples,
        teacher_positions=row_positions(0),
    )


def _valid_starts(batch: Batch, length: int) -> Array:
    """One row: bool [T], where `length` response tokens of one sample begin, except at the sample's first token."""
    segment_ids = batch.segment_ids
    (row_length,) = segment_ids.shape
    is_valid = (batch.positions > 0) & (segment_ids > 0)
    for i in range(min(length, row_length)):
        is_valid &= _shift_left(batch.response_mask, i, False) & (_shift_left(segment_ids, i, 0) == segment_ids)
    return is_valid & (jnp.arange(row_length) + length <= row_length)


def _shift_left(values: Array, i: int, fill: int | bool) -> Array:
    """values[t + i], with `fill` beyond the end of the row."""
    return jnp.concatenate([values[i:], jnp.full((i,), fill, values.dtype)])


def _count_skipped_samples(batch: Batch, is_valid: Array) -> Array:
    """One row: int32 [], samples without a valid start."""
    row_length = len(is_valid)
    samples = jnp.sum((batch.positions == 0) & (batch.segment_ids > 0), dtype=jnp.int32)
    has_start = jax.ops.segment_max(is_valid.astype(jnp.int32), batch.segment_ids, num_segments=row_length + 1)
    return samples - jnp.sum(jnp.maximum(has_start[1:], 0), dtype=jnp.int32)


def _place_segments(key: Array, batch: Batch, segments: int, length: int) -> tuple[Array, Array]:
    """One row: offsets [T] (1..length inside the chosen segments) and the number of samples without a segment.

    Each sample's segments are placed one after another, every start uniform over the starts that are still free; a
    sample gets as many segments as fit. A start is free if its `length` tokens are all response and not yet noise, and
    at least one token of the sample precedes them.
    """
    segment_ids = batch.segment_ids
    (row_length,) = segment_ids.shape
    index = jnp.arange(row_length)

    free = is_valid = _valid_starts(batch, length)
    offset = jnp.zeros_like(segment_ids)
    for segment_key in jax.random.split(key, segments):
        score = jnp.where(free, jax.random.uniform(segment_key, (row_length,)), _INVALID)
        best = jax.ops.segment_max(score, segment_ids, num_segments=row_length + 1)
        first_best = jax.ops.segment_min(
            jnp.where(free & (score == best[segment_ids]), index, row_length), segment_ids, num_segments=row_length + 1
        )
        start = free & (index == first_best[segment_ids])
        for i in range(min(length, row_length)):
            offset = jnp.where(jnp.roll(start, i), i + 1, offset)
        for i in range(1 - length, length):
            free &= ~jnp.roll(start, i)
    return offset, _count_skipped_samples(batch, is_valid)


def _draw_from_past(key: Array, batch: Batch, offset: Array) -> Array:
    """One row: for every position a token drawn uniformly from the earlier tokens of its sample, noise included.

    A noise token may be a copy of an earlier noise token. So each position first draws the index it copies from; the
    chains of copies are then followed to a clean token by pointer jumping, which halves their length every round.
    """
    index = jnp.arange(offset.shape[0], dtype=jnp.int32)
    back = jax.random.randint(key, offset.shape, 1, jnp.maximum(batch.positions, 1) + 1, jnp.int32)
    source = jnp.where(offset > 0, index - back, index)
    longest_chain = max(offset.shape[0] - 1, 1)
    for _ in range(longest_chain.bit_length()):
        source = source[source]
    return batch.tokens[source]
