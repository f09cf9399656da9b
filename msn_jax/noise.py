"""Ahead noise: the idea, part one ("Make Some Noise", arXiv 2406.17404, section 3.1).

Supervised fine-tuning shows a model its context exactly as it should be. Jacobi decoding shows it something
else: a few wrong guesses behind the last certain token. MSN closes that gap by training on such input. A short
segment of the response is replaced by tokens that occurred earlier in the same sample, and the labels stay clean:

    clean    def  area ( w  ,  h  ) :  return w  *  h  <eos>
    input    def  area ( w  ,  h  ) :  return (  w  :  <eos>
    labels   area (    w ,  h  )  : return w  *  h  <eos>
    offset   0    0    0 0  0  0  0 0  0      1  2  3  0

At offset 1 the model sees one wrong token and must still predict the one after the right one (`*`), and so on:
exactly what it is asked for when it drafts for itself (`decode/loop.py`).

Invariants (tests/test_noise.py): only response positions change; segments are contiguous, do not overlap and stay
inside their sample; every noise token occurs earlier in its own sample; labels are never touched; the result
depends on (key, row index) and not on the number of devices.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from msn_jax.config import NoiseConfig

_NEVER = -1.0  # the score of a position where no segment may start


@struct.dataclass
class Batch:
    """Packed rows. Every array is [B, T]."""

    tokens: Array  # int32, clean
    positions: Array  # int32, restart at 0 in every sample
    segment_ids: Array  # int32, 1, 2, ... number the samples of a row, 0 is padding
    response_mask: Array  # bool, the tokens the model learns to say, EOS included


@struct.dataclass
class NoisyBatch:
    """A batch with its corrupted inputs; the labels are still `batch.tokens`, one to the left."""

    inputs: Array  # int32 [B, T]
    noise_offset: Array  # int32 [B, T], 1..length inside a segment, 0 elsewhere
    skipped: Array  # int32 [B], samples whose response holds no room for a segment: they stay clean


def ahead_noise(key: Array, batch: Batch, cfg: NoiseConfig, vocab_size: int) -> NoisyBatch:
    """Corrupts `cfg.segments` segments of `cfg.length` tokens in the response of every sample.

    Args:
      key: typed PRNG key of this step; row b of the batch uses `fold_in(key, b)`.
      batch: packed rows [B, T].
      cfg: kind 'ahead' draws from the sample's own past, 'uniform' from the vocabulary, 'none' changes nothing.
      vocab_size: V, used by 'uniform' only.

    Returns:
      The inputs, where the noise lies, and how many samples were too short for it.
    """
    if cfg.kind == "none":
        offset = jnp.zeros_like(batch.tokens)
        return NoisyBatch(inputs=batch.tokens, noise_offset=offset, skipped=offset[:, 0])

    def corrupt_row(row: Array, batch: Batch) -> NoisyBatch:
        place_key, token_key = jax.random.split(jax.random.fold_in(key, row))
        offset, skipped = _place_segments(place_key, batch, cfg.segments, cfg.length)
        if cfg.kind == "ahead":
            noise = _draw_from_past(token_key, batch, offset)
        else:
            noise = jax.random.randint(token_key, offset.shape, 0, vocab_size, jnp.int32)
        return NoisyBatch(jnp.where(offset > 0, noise, batch.tokens), offset, skipped)

    rows = jnp.arange(batch.tokens.shape[0])
    return jax.vmap(corrupt_row)(rows, batch)


def _place_segments(key: Array, batch: Batch, segments: int, length: int) -> tuple[Array, Array]:
    """One row: offsets [T] (1..length inside the chosen segments) and the number of samples without any.

    Each sample's segments are placed one after another, each start uniform over those still free; a sample gets as
    many as find room. A start is free if its `length` tokens are all response, none of them noise already, and at
    least one token of the sample lies before them.
    """
    segment_ids = batch.segment_ids
    (row_length,) = segment_ids.shape
    index = jnp.arange(row_length)

    def ahead_of(values: Array, i: int, fill: int | bool) -> Array:
        """values[t + i], with `fill` beyond the end of the row."""
        return jnp.concatenate([values[i:], jnp.full((i,), fill, values.dtype)])

    free = (batch.positions > 0) & (segment_ids > 0)
    for i in range(min(length, row_length)):
        free &= ahead_of(batch.response_mask, i, False) & (ahead_of(segment_ids, i, 0) == segment_ids)
    free &= index + length <= row_length

    offset = jnp.zeros_like(segment_ids)
    has_room = free
    for segment_key in jax.random.split(key, segments):
        score = jnp.where(free, jax.random.uniform(segment_key, (row_length,)), _NEVER)
        best = jax.ops.segment_max(score, segment_ids, num_segments=row_length + 1)
        first_best = jax.ops.segment_min(
            jnp.where(free & (score == best[segment_ids]), index, row_length), segment_ids, num_segments=row_length + 1
        )
        start = free & (index == first_best[segment_ids])
        for i in range(min(length, row_length)):
            offset = jnp.where(jnp.roll(start, i), i + 1, offset)
        for i in range(1 - length, length):
            free &= ~jnp.roll(start, i)
    samples = jnp.sum((batch.positions == 0) & (segment_ids > 0), dtype=jnp.int32)
    per_sample = jax.ops.segment_max(has_room.astype(jnp.int32), segment_ids, num_segments=row_length + 1)
    return offset, samples - jnp.sum(jnp.maximum(per_sample[1:], 0), dtype=jnp.int32)


def _draw_from_past(key: Array, batch: Batch, offset: Array) -> Array:
    """One row: for every position a token drawn uniformly from those before it in its sample, noise included.

    A noise token may be copied from an earlier noise token. Each position therefore first draws *where* it copies
    from, and the chains of copies are then followed to a clean token, halving their length at every round.
    """
    index = jnp.arange(offset.shape[0], dtype=jnp.int32)
    back = jax.random.randint(key, offset.shape, 1, jnp.maximum(batch.positions, 1) + 1, jnp.int32)
    source = jnp.where(offset > 0, index - back, index)
    longest_chain = max(offset.shape[0] - 1, 1)
    for _ in range(longest_chain.bit_length()):
        source = source[source]
    return batch.tokens[source]
