"""Training inputs with ahead noise ("Make Some Noise", MSN, arXiv 2406.17404, section 3.1).

Supervised fine-tuning always conditions on correct context. Jacobi decoding does not: after the last verified token
come a few draft tokens, most of them wrong. MSN closes this gap by training on such inputs. A short segment of the
response, the *noise segment*, is replaced by tokens that occurred earlier in the same sample (*ahead noise*); the
labels stay clean:

    clean    def   area  (  w  ,  h  )  :       return  w  *  h      <eos>
    input    def   area  (  w  ,  h  )  :       return  (  w  :      <eos>
    labels   area  (     w  ,  h  )  :  return  w       *  h  <eos>
    offset   0     0     0  0  0  0  0  0       0       1  2  3      0

At offset 1 the model sees `(` instead of `w` and must still predict `*`, the token that follows `w`; at offset 2 it
sees two wrong tokens, and so on. A model that drafts for itself faces the same task (`decode/loop.py`).

A training row packs several samples. Noise inside the row has a price: every later token of the sample is trained on
corrupted context, so a row can contain only a little noise. With `cfg.blocks` the row stays clean, and *noise blocks*
are appended to it; the row's own tokens do not attend to them:

    row      def  area ( w  ,  h  ) :  return w  *  h  <eos>
    block                                     (  w         attends to `def ... return` and itself; labels `*  h`
    block                                        :  (      attends to `def ... return w` and itself; labels `h  <eos>`

A block costs only its own few tokens and has clean context before it, as drafts do in decoding, so a row can have
many. With `self_distillation` the targets of block tokens are the model's own predictions on the clean row instead of
the labels: a draft is accepted if it equals the model's own prediction, even where that differs from the label.

Several kinds of noise can be mixed (`cfg.kind = 'ahead,uniform'`): every segment or block draws one of them. Blocks of
kind 'drafts' end up with what a decoder's tree holds, the model's own wrong drafts (`redraft.py`). In a curriculum
(`cfg.curriculum_steps`), only the first offsets of a segment or block count at the beginning of the training.

Invariants (tests/test_noise.py): only response positions change; noise segments are contiguous, do not overlap and stay
inside their sample; every ahead-noise token is a copy of an earlier token of its sample, noise included; labels never
change; the result depends on the key and on the row's index in the batch, not on the number of devices.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from msn_jax import config, masks
from msn_jax.config import NoiseConfig

_INVALID = -1.0  # score of a position where no noise segment or block may start


@struct.dataclass
class Batch:
    """Packed rows. Every array is [B, T], or [T] for a single row."""

    tokens: Array  # int32, clean
    positions: Array  # int32, restart at 0 in every sample
    segment_ids: Array  # int32, index of the sample in its row, from 1; 0 is padding
    response_mask: Array  # bool, the tokens that the model learns to predict, EOS included


@struct.dataclass
class TrainingInputs:
    """Inputs and labels of one training step. R is T, or T + E with E tokens in appended noise blocks."""

    input_tokens: Array  # int32 [B, R]
    positions: Array  # int32 [B, R], within the sample
    mask: masks.Mask  # [B, R, R], the attention mask
    labels: Array  # int32 [B, R], the clean next token
    loss_mask: Array  # bool [B, R], where the label is a response token of the same sample
    noise_offset: Array  # int32 [B, R], 1..length at noise tokens, 0 elsewhere
    num_skipped_samples: Array  # int32 [B], samples whose response is too short for noise
    # int32 [B, E]: for each block token, the index in the row of the clean token that it replaces. In
    # self-distillation, the model's prediction there is the target.
    teacher_positions: Array | None = None
    drafted: Array | None = None  # bool [B, M], as in `Blocks`


def clean_inputs(batch: Batch) -> TrainingInputs:
    """The batch without noise."""
    following = jax.tree.map(lambda values: jnp.roll(values, -1, axis=1), batch)
    # `positions > 0` masks the last column, which wraps around to the first token of the row.
    loss_mask = following.response_mask & (following.segment_ids == batch.segment_ids) & (following.positions > 0)
    zeros = jnp.zeros_like(batch.tokens)
    mask = masks.Packed(batch.segment_ids)
    return TrainingInputs(batch.tokens, batch.positions, mask, following.tokens, loss_mask, zeros, zeros[:, 0])


def curriculum(step: Array, cfg: NoiseConfig) -> Array | None:
    """The last offset that counts in a training step, int32 []; None if there is no curriculum.

    The first `cfg.curriculum_steps` steps have `cfg.length` equal stages, with offsets up to 1, 2, ...

    Args:
      step: int32 [], the number of steps before this one.
      cfg: static.
    """
    if cfg.curriculum_steps == 0:
        return None
    begins = [-(-stage * cfg.curriculum_steps // cfg.length) for stage in range(1, cfg.length)]  # rounded up
    return 1 + jnp.sum(step >= jnp.array(begins, jnp.int32), dtype=jnp.int32)


def build_inputs(
    key: Array, batch: Batch, cfg: NoiseConfig, vocab_size: int, last_offset: Array | None = None
) -> TrainingInputs:
    """The training inputs that `cfg` asks for: clean, or with noise segments in the rows or noise blocks appended.

    Arguments as in `corrupt`. Blocks of kind 'drafts' hold their first noise (`draw_blocks`).
    """
    inputs = clean_inputs(batch)
    if cfg.kind == "none":
        return inputs
    if cfg.blocks:
        return _append_blocks(inputs, batch, draw_blocks(key, batch, cfg, vocab_size, last_offset), cfg.length)
    noisy = corrupt(key, batch, cfg, vocab_size, last_offset)
    return inputs.replace(
        input_tokens=noisy.input_tokens, noise_offset=noisy.noise_offset, num_skipped_samples=noisy.num_skipped_samples
    )


@struct.dataclass
class NoisyBatch:
    """A batch's corrupted inputs. The labels are still `batch.tokens`, shifted by one."""

    input_tokens: Array  # int32 [B, T]
    noise_offset: Array  # int32 [B, T], 1..length inside a noise segment, 0 elsewhere
    num_skipped_samples: Array  # int32 [B], samples whose response is too short for a noise segment; they stay clean


def corrupt(
    key: Array, batch: Batch, cfg: NoiseConfig, vocab_size: int, last_offset: Array | None = None
) -> NoisyBatch:
    """In every sample, overwrites up to `cfg.segments` segments of `cfg.length` response tokens with noise.

    Args:
      key: typed PRNG key of this step; row b of the batch uses `fold_in(key, b)`.
      batch: packed rows [B, T].
      cfg: kind 'ahead' draws noise from the sample's own past, 'uniform' from the vocabulary; 'token', for noise
        blocks only, is always `cfg.token`; 'none' adds none. Of several kinds, every segment or block draws one.
      vocab_size: V, only for 'uniform'.
      last_offset: int32 [], from `curriculum`: the rest of each segment stays clean; None: no limit.
    """
    if cfg.kind == "none":
        zeros = jnp.zeros_like(batch.tokens)
        return NoisyBatch(input_tokens=batch.tokens, noise_offset=zeros, num_skipped_samples=zeros[:, 0])
    kinds = config.noise_kinds(cfg)

    def corrupt_row(index: Array, row: Batch) -> NoisyBatch:
        segment_key, kind_key, token_keys = _row_keys(jax.random.fold_in(key, index), len(kinds))
        offset, num_skipped_samples = _place_noise_segments(segment_key, row, cfg.segments, cfg.length)
        if last_offset is not None:
            offset = jnp.where(offset <= last_offset, offset, 0)
        # Every position draws a kind, and every noise token has the kind of the first position of its segment.
        drawn = jax.random.randint(kind_key, offset.shape, 0, len(kinds), jnp.int32)
        kind = drawn[jnp.arange(len(offset)) - jnp.maximum(offset - 1, 0)]
        noise = {name: (offset > 0) & (kind == i) for i, name in enumerate(kinds)}
        keys = dict(zip(kinds, token_keys, strict=True))
        tokens = row.tokens
        if "uniform" in kinds:
            uniform = jax.random.randint(keys["uniform"], offset.shape, 0, vocab_size, jnp.int32)
            tokens = jnp.where(noise["uniform"], uniform, tokens)
        if "ahead" in kinds:  # last, because its tokens can be copies of the other noise
            tokens = _copy_from_past(keys["ahead"], tokens, row.positions, noise["ahead"])
        return NoisyBatch(tokens, offset, num_skipped_samples)

    return jax.vmap(corrupt_row)(jnp.arange(len(batch.tokens)), batch)


def _row_keys(key: Array, num_kinds: int) -> tuple[Array, Array, list[Array]]:
    """The keys of a row: of the places of its noise, of their kinds, and of the tokens of every kind.

    The first kind has the key that it would have alone.
    """
    place_key, token_key = jax.random.split(key)
    kind_key, *other_keys = jax.random.split(jax.random.fold_in(key, 2), num_kinds)
    return place_key, kind_key, [token_key, *other_keys]


@struct.dataclass
class Blocks:
    """Noise blocks: M blocks of L tokens per row."""

    tokens: Array  # int32 [B, M, L]
    starts: Array  # int32 [B, M], the index in the row of the token that each block's first token replaces
    # bool [B, M, L], the tokens that count: not where the row has too few possible starts, nor beyond the last offset
    valid: Array
    num_skipped_samples: Array  # int32 [B], samples whose response is too short for a block
    # bool [B, M], the blocks in which the model's drafts will replace this noise (`redraft.py`); None: kind not in use
    drafted: Array | None = None

    def positions_in_row(self, length: int) -> Array:
        """int32 [B, M * L]: the index in the row of the token that each block token replaces."""
        index = self.starts[:, :, None] + jnp.arange(length, dtype=jnp.int32)[None, None, :]
        return index.reshape(len(index), -1)


def draw_blocks(
    key: Array, batch: Batch, cfg: NoiseConfig, vocab_size: int, last_offset: Array | None = None
) -> Blocks:
    """Draws `cfg.blocks` noise blocks per row.

    The starts are distinct and uniform over the valid ones. A start is valid (`_valid_starts`) if the `cfg.length`
    tokens that its block replaces and the token after them, the label of the block's last token, are response tokens of
    the same sample. A block of kind 'drafts' first holds noise of another kind: one of those that `cfg.kind` names, or
    ahead noise. Arguments as in `corrupt`, except that no token beyond the last offset counts.
    """
    row_length = batch.tokens.shape[1]
    kinds = config.noise_kinds(cfg)
    first_kinds = tuple(kind for kind in kinds if kind != "drafts") or ("ahead",)
    offset = jnp.arange(1, cfg.length + 1, dtype=jnp.int32)[None, :]
    counts = offset <= (cfg.length if last_offset is None else last_offset)

    def blocks_of_row(index: Array, row: Batch) -> Blocks:
        start_key, kind_key, token_keys = _row_keys(jax.random.fold_in(key, index), len(first_kinds))
        is_valid = _valid_starts(row, cfg.length + 1)  # the last noise token needs a label, too
        score = jnp.where(is_valid, jax.random.uniform(start_key, (row_length,)), _INVALID)
        best, starts = jax.lax.top_k(score, min(cfg.blocks, row_length))
        starts = starts.astype(jnp.int32)
        num_before = row.positions[starts]  # tokens of the sample before the block

        def draw(kind: str, token_key: Array) -> Array:
            if kind == "ahead":
                return _draw_block_tokens(token_key, row.tokens, starts, num_before, cfg.length)
            if kind == "token":
                return jnp.full((len(starts), cfg.length), cfg.token, jnp.int32)
            return jax.random.randint(token_key, (len(starts), cfg.length), 0, vocab_size, jnp.int32)

        of_kinds = jnp.stack([draw(*pair) for pair in zip(first_kinds, token_keys, strict=True)])
        kind_key, draft_key = jax.random.split(kind_key)
        kind = jax.random.randint(kind_key, starts.shape, 0, len(first_kinds), jnp.int32)
        tokens = jnp.take_along_axis(of_kinds, kind[None, :, None], axis=0)[0]
        drafted = jax.random.randint(draft_key, starts.shape, 0, len(kinds)) == 0 if "drafts" in kinds else None
        valid = (best > _INVALID)[:, None] & counts
        return Blocks(tokens, starts, valid, _count_skipped_samples(row, is_valid), drafted)

    return jax.vmap(blocks_of_row)(jnp.arange(len(batch.tokens)), batch)


def _draw_block_tokens(key: Array, tokens: Array, starts: Array, num_before: Array, length: int) -> Array:
    """For a single row: block tokens [M, L], drawn uniformly from the earlier tokens of their sample and block."""
    blocks = jnp.zeros((len(starts), length), jnp.int32)
    for i, token_key in enumerate(jax.random.split(key, length)):
        back = jax.random.randint(token_key, starts.shape, 1, jnp.maximum(num_before + i, 1) + 1, jnp.int32)
        from_block = jnp.take_along_axis(blocks, jnp.clip(i - back, 0, length - 1)[:, None], axis=1)[:, 0]
        from_row = tokens[jnp.clip(starts + i - back, 0, len(tokens) - 1)]
        blocks = blocks.at[:, i].set(jnp.where(back <= i, from_block, from_row))
    return blocks


def _append_blocks(inputs: TrainingInputs, batch: Batch, blocks: Blocks, length: int) -> TrainingInputs:
    """The clean inputs with the noise blocks appended to every row."""
    B, T = batch.tokens.shape
    M = blocks.starts.shape[1]

    def index_in_row(shift: int) -> Array:
        """[B, M * L]: the index in the row of the token that each block token replaces, plus `shift`."""
        return jnp.minimum(blocks.positions_in_row(length) + shift, T - 1)

    def append(values: Array, more: Array) -> Array:
        return jnp.concatenate([values, more.reshape(B, M * length)], axis=1)

    valid = blocks.valid.reshape(B, M * length)
    offset = jnp.tile(jnp.arange(1, length + 1, dtype=jnp.int32), M)[None, :]
    return TrainingInputs(
        input_tokens=append(inputs.input_tokens, blocks.tokens),
        positions=append(inputs.positions, jnp.take_along_axis(batch.positions, index_in_row(0), axis=1)),
        mask=masks.blocks(batch.segment_ids, blocks.starts, length),
        labels=append(inputs.labels, jnp.take_along_axis(batch.tokens, index_in_row(1), axis=1)),
        loss_mask=append(inputs.loss_mask, valid),
        noise_offset=append(inputs.noise_offset, jnp.where(valid, offset, 0)),
        num_skipped_samples=blocks.num_skipped_samples,
        teacher_positions=index_in_row(0),
        drafted=blocks.drafted,
    )


def _valid_starts(row: Batch, length: int) -> Array:
    """For a single row: bool [T], True where `length` consecutive tokens are response tokens of the same sample.

    The first token of a sample is never a start, because no earlier token could replace it.
    """
    segment_ids = row.segment_ids
    (row_length,) = segment_ids.shape
    is_valid = (row.positions > 0) & (segment_ids > 0)
    for i in range(min(length, row_length)):
        is_valid &= _shift_left(row.response_mask, i, False) & (_shift_left(segment_ids, i, 0) == segment_ids)
    return is_valid & (jnp.arange(row_length) + length <= row_length)


def _shift_left(values: Array, i: int, fill: int | bool) -> Array:
    """values[t + i], with `fill` beyond the end of the row."""
    return jnp.concatenate([values[i:], jnp.full((i,), fill, values.dtype)])


def _count_skipped_samples(row: Batch, is_valid: Array) -> Array:
    """For a single row: int32 [], number of samples without a valid start."""
    row_length = len(is_valid)
    samples = jnp.sum((row.positions == 0) & (row.segment_ids > 0), dtype=jnp.int32)
    has_start = jax.ops.segment_max(is_valid.astype(jnp.int32), row.segment_ids, num_segments=row_length + 1)
    return samples - jnp.sum(jnp.maximum(has_start[1:], 0), dtype=jnp.int32)


def _place_noise_segments(key: Array, row: Batch, count: int, length: int) -> tuple[Array, Array]:
    """For a single row: offsets [T], 1..length inside noise segments, and the number of samples without one.

    A sample's noise segments are drawn sequentially, each start uniform over the starts that are still free. Where none
    is left, the sample gets fewer. A start is free if its `length` tokens are all response tokens and not yet noise,
    and at least one token of the sample precedes them.
    """
    segment_ids = row.segment_ids
    (row_length,) = segment_ids.shape
    index = jnp.arange(row_length)

    free = is_valid = _valid_starts(row, length)
    offset = jnp.zeros_like(segment_ids)
    for start_key in jax.random.split(key, count):
        score = jnp.where(free, jax.random.uniform(start_key, (row_length,)), _INVALID)
        best = jax.ops.segment_max(score, segment_ids, num_segments=row_length + 1)
        first_best = jax.ops.segment_min(
            jnp.where(free & (score == best[segment_ids]), index, row_length), segment_ids, num_segments=row_length + 1
        )
        start = free & (index == first_best[segment_ids])
        for i in range(min(length, row_length)):
            offset = jnp.where(jnp.roll(start, i), i + 1, offset)
        for i in range(1 - length, length):
            free &= ~jnp.roll(start, i)
    return offset, _count_skipped_samples(row, is_valid)


def _copy_from_past(key: Array, tokens: Array, positions: Array, is_copy: Array) -> Array:
    """For a single row: `tokens` [T] where not `is_copy`; there, uniform draws from the sample's earlier tokens.

    A copied token may be a copy itself. So each position first draws the index it copies from; the chains of copies are
    then followed to a token that is none by pointer jumping, which halves their length every round.
    """
    index = jnp.arange(len(tokens), dtype=jnp.int32)
    back = jax.random.randint(key, tokens.shape, 1, jnp.maximum(positions, 1) + 1, jnp.int32)
    source = jnp.where(is_copy, index - back, index)
    longest_chain = max(len(tokens) - 1, 1)
    for _ in range(longest_chain.bit_length()):
        source = source[source]
    return tokens[source]
