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

Noise in the text has a price: what is learned behind it is learned from a spoilt context, so a row holds little of it.
With `blocks` the text stays as it is, and the noise stands beside it, where no token of the text can see it:

    text     def  area ( w  ,  h  ) :  return w  *  h  <eos>
    block                                     (  w         sees `def ... return` and itself; labels `*  h`
    block                                        :  (      sees `def ... return w` and itself; labels `h  <eos>`

Each block costs only its own few tokens, stands behind a clean context, as drafts do, and a row holds many. And the
clean text beside it can be its teacher (`self_distillation`): a draft is accepted where it is what the model itself
says behind the clean text, so that is what a block learns to say, whatever the label is.

Invariants (tests/test_noise.py): only response positions change; segments are contiguous, do not overlap and stay
inside their sample; every noise token occurs earlier in its own sample; labels are never touched; the result
depends on (key, row index) and not on the number of devices.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from msn_jax import masks
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
class Reading:
    """What the model reads in training, and what it should say. R is T, or T + E with noise beside the text."""

    inputs: Array  # int32 [B, R]
    positions: Array  # int32 [B, R], in their sample
    mask: Array  # bool [B, R, R], who sees whom
    labels: Array  # int32 [B, R]: the clean token that follows
    is_label: Array  # bool [B, R]: where there is one, a response token of the same sample
    noise_offset: Array  # int32 [B, R], 1..length at noise, 0 elsewhere
    skipped: Array  # int32 [B], samples whose response has no room for noise
    teachers: Array | None = None  # int32 [B, E]: for a token beside the text, the place in it that says the same


def clean(batch: Batch) -> Reading:
    """The batch as it stands."""
    following = jax.tree.map(lambda values: jnp.roll(values, -1, axis=1), batch)  # the last column is masked below
    is_label = following.response_mask & (following.segment_ids == batch.segment_ids) & (following.positions > 0)
    nowhere = jnp.zeros_like(batch.tokens)
    mask = masks.segments(batch.segment_ids)
    return Reading(batch.tokens, batch.positions, mask, following.tokens, is_label, nowhere, nowhere[:, 0])


def read(key: Array, batch: Batch, cfg: NoiseConfig, vocab_size: int) -> Reading:
    """The batch with the noise of `cfg`; arguments as those of `ahead_noise`."""
    reading = clean(batch)
    if cfg.kind == "none":
        return reading
    if cfg.blocks:
        return _beside(reading, batch, ahead_blocks(key, batch, cfg, vocab_size), cfg.length)
    noisy = ahead_noise(key, batch, cfg, vocab_size)
    return reading.replace(inputs=noisy.inputs, noise_offset=noisy.noise_offset, skipped=noisy.skipped)


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


@struct.dataclass
class Blocks:
    """Noise beside the text: M blocks of L tokens a row."""

    tokens: Array  # int32 [B, M, L]
    starts: Array  # int32 [B, M], the place in the row that the first token of a block stands for
    real: Array  # bool [B, M], False where the row had room for fewer
    skipped: Array  # int32 [B], samples whose response has no room for a block


def ahead_blocks(key: Array, batch: Batch, cfg: NoiseConfig, vocab_size: int) -> Blocks:
    """Draws `cfg.blocks` blocks per row, whose starts are distinct and uniform over all places with room for one:
    `cfg.length` response tokens behind which the response goes on. Arguments as those of `ahead_noise`.
    """
    row_length = batch.tokens.shape[1]

    def blocks_of_row(row: Array, batch: Batch) -> Blocks:
        place_key, token_key = jax.random.split(jax.random.fold_in(key, row))
        free = _free_starts(batch, cfg.length + 1)  # the last token has a label, too
        score = jnp.where(free, jax.random.uniform(place_key, (row_length,)), _NEVER)
        best, starts = jax.lax.top_k(score, min(cfg.blocks, row_length))
        starts = starts.astype(jnp.int32)
        before = batch.positions[starts]  # tokens of the sample that lie before the block
        if cfg.kind == "ahead":
            tokens = _draw_blocks(token_key, batch.tokens, starts, before, cfg.length)
        else:
            tokens = jax.random.randint(token_key, (len(starts), cfg.length), 0, vocab_size, jnp.int32)
        return Blocks(tokens, starts, best > _NEVER, _without_room(batch, free))

    return jax.vmap(blocks_of_row)(jnp.arange(len(batch.tokens)), batch)


def _draw_blocks(key: Array, tokens: Array, starts: Array, before: Array, length: int) -> Array:
    """One row: block tokens [M, L], each drawn uniformly from those before it in its sample, those of its block
    included.
    """
    blocks = jnp.zeros((len(starts), length), jnp.int32)
    for i, token_key in enumerate(jax.random.split(key, length)):
        back = jax.random.randint(token_key, starts.shape, 1, jnp.maximum(before + i, 1) + 1, jnp.int32)
        own = jnp.take_along_axis(blocks, jnp.clip(i - back, 0, length - 1)[:, None], axis=1)[:, 0]
        text = tokens[jnp.clip(starts + i - back, 0, len(tokens) - 1)]
        blocks = blocks.at[:, i].set(jnp.where(back <= i, own, text))
    return blocks


def _beside(reading: Reading, batch: Batch, blocks: Blocks, length: int) -> Reading:
    """The clean reading with blocks behind the end of every row."""
    B, T = batch.tokens.shape
    M = blocks.starts.shape[1]

    def places(shift: int) -> Array:
        """Every block token's place in the text, `shift` to the right: [B, M * L]."""
        found = blocks.starts[:, :, None] + (jnp.arange(length, dtype=jnp.int32) + shift)[None, None, :]
        return jnp.minimum(found, T - 1).reshape(B, M * length)

    def append(values: Array, more: Array) -> Array:
        return jnp.concatenate([values, more.reshape(B, M * length)], axis=1)

    real = jnp.repeat(blocks.real, length, axis=1)
    offset = jnp.tile(jnp.arange(1, length + 1, dtype=jnp.int32), M)[None, :]
    return Reading(
        inputs=append(reading.inputs, blocks.tokens),
        positions=append(reading.positions, jnp.take_along_axis(batch.positions, places(0), axis=1)),
        mask=masks.blocks(batch.segment_ids, blocks.starts, length),
        labels=append(reading.labels, jnp.take_along_axis(batch.tokens, places(1), axis=1)),
        is_label=append(reading.is_label, real),
        noise_offset=append(reading.noise_offset, jnp.where(real, offset, 0)),
        skipped=blocks.skipped,
        teachers=places(0),
    )


def _free_starts(batch: Batch, length: int) -> Array:
    """One row: bool [T], where `length` tokens are all response of one sample and not its first token."""
    segment_ids = batch.segment_ids
    (row_length,) = segment_ids.shape
    free = (batch.positions > 0) & (segment_ids > 0)
    for i in range(min(length, row_length)):
        free &= _ahead_of(batch.response_mask, i, False) & (_ahead_of(segment_ids, i, 0) == segment_ids)
    return free & (jnp.arange(row_length) + length <= row_length)


def _ahead_of(values: Array, i: int, fill: int | bool) -> Array:
    """values[t + i], with `fill` beyond the end of the row."""
    return jnp.concatenate([values[i:], jnp.full((i,), fill, values.dtype)])


def _without_room(batch: Batch, free: Array) -> Array:
    """One row: int32 [], samples that have no free start."""
    row_length = len(free)
    samples = jnp.sum((batch.positions == 0) & (batch.segment_ids > 0), dtype=jnp.int32)
    has_room = jax.ops.segment_max(free.astype(jnp.int32), batch.segment_ids, num_segments=row_length + 1)
    return samples - jnp.sum(jnp.maximum(has_room[1:], 0), dtype=jnp.int32)


def _place_segments(key: Array, batch: Batch, segments: int, length: int) -> tuple[Array, Array]:
    """One row: offsets [T] (1..length inside the chosen segments) and the number of samples without any.

    Each sample's segments are placed one after another, each start uniform over those still free; a sample gets as
    many as find room. A start is free if its `length` tokens are all response, none of them noise already, and at
    least one token of the sample lies before them.
    """
    segment_ids = batch.segment_ids
    (row_length,) = segment_ids.shape
    index = jnp.arange(row_length)

    free = all_free = _free_starts(batch, length)
    offset = jnp.zeros_like(segment_ids)
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
    return offset, _without_room(batch, all_free)


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
