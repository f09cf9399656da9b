"""Several kinds of noise in one batch, and the curriculum over offsets."""

import functools

import chi_square
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msn_jax import noise
from msn_jax.config import NoiseConfig
from msn_jax.noise import Batch

pytestmark = pytest.mark.usefixtures("quick_compilation")
V = 1000  # the batch's own tokens are V and above, so that they differ from uniform noise
TOKEN = 7
B, T, M, L = 8, 48, 6, 3  # one shape, so that every program is compiled once


def batch_of() -> Batch:
    """Two samples per row, then padding; every token of the batch is unique."""
    tokens = V + np.arange(B * T, dtype=np.int32).reshape(B, T)
    positions = np.tile(np.concatenate([np.arange(20), np.arange(24), np.zeros(4)]).astype(np.int32), (B, 1))
    segment_ids = np.tile(np.repeat([1, 2, 0], [20, 24, 4]).astype(np.int32), (B, 1))
    return Batch(tokens, positions, segment_ids, (positions >= 6) & (segment_ids > 0))


@functools.partial(jax.jit, static_argnames=("kind", "segments"))
def segments_of(key, batch, kind, segments=1, last_offset=None):
    return noise.corrupt(key, batch, NoiseConfig(kind, segments, L), V, last_offset)


@functools.partial(jax.jit, static_argnames="kind")
def blocks_of(key, batch, kind, last_offset=None):
    return noise.draw_blocks(key, batch, NoiseConfig(kind, length=L, blocks=M, token=TOKEN), V, last_offset)


def row_key(key, b):
    """The keys that one kind alone has for the places and the tokens of its noise."""
    return jax.random.split(jax.random.fold_in(key, b))


# --- One kind alone


@pytest.mark.parametrize("kind", ["ahead", "uniform"])
def test_one_kind_alone_draws_segments_from_the_token_key_of_its_row(kind):
    batch, key = batch_of(), jax.random.key(4)
    noisy = jax.device_get(segments_of(key, batch, kind, 2))
    for b in range(B):
        _, token_key = row_key(key, b)
        expected = batch.tokens[b].copy()
        low, high = (1, np.maximum(batch.positions[b], 1) + 1) if kind == "ahead" else (0, V)
        drawn = np.asarray(jax.random.randint(token_key, (T,), low, high, jnp.int32))
        for t in np.flatnonzero(noisy.noise_offset[b]):  # in order, because a copy can be copied
            expected[t] = expected[t - drawn[t]] if kind == "ahead" else drawn[t]
        np.testing.assert_array_equal(noisy.input_tokens[b], expected)


@pytest.mark.parametrize("kind", ["ahead", "uniform"])
def test_one_kind_alone_draws_blocks_from_the_token_key_of_its_row(kind):
    batch, key = batch_of(), jax.random.key(4)
    blocks = jax.device_get(blocks_of(key, batch, kind))
    assert blocks.drafted is None
    for b in range(B):
        start_key, token_key = row_key(key, b)
        scores = np.asarray(jax.random.uniform(start_key, (T,)))[blocks.starts[b]]
        assert (np.diff(scores) < 0).all()
        if kind == "uniform":
            np.testing.assert_array_equal(blocks.tokens[b], jax.random.randint(token_key, (M, L), 0, V, jnp.int32))
            continue
        before = batch.positions[b, blocks.starts[b]]
        drawn = [
            np.asarray(jax.random.randint(one, (M,), 1, before + i + 1, jnp.int32))
            for i, one in enumerate(jax.random.split(token_key, L))
        ]
        for m, start in enumerate(blocks.starts[b]):
            sequence = batch.tokens[b, :start].tolist()
            for back in drawn:
                sequence.append(sequence[-back[m]])
            assert blocks.tokens[b, m].tolist() == sequence[-L:]


# --- Mixtures


def test_every_segment_draws_one_of_the_kinds_with_equal_probability():
    """With one segment per sample, ahead noise copies the sample's own tokens, and no other noise."""
    batch, counts = batch_of(), np.zeros(2, int)
    for seed in range(60):
        noisy = jax.device_get(segments_of(jax.random.key(seed), batch, "uniform,ahead", 1))
        is_own = (noisy.input_tokens >= V)[noisy.noise_offset > 0].reshape(-1, L)
        assert (is_own.all(axis=1) | ~is_own.any(axis=1)).all()
        counts += np.bincount(is_own[:, 0].astype(int), minlength=2)
    assert counts.sum() == 60 * B * 2
    assert chi_square.statistic(counts, [1 / 2] * 2) < 19.5  # p = 1e-5


def test_ahead_noise_copies_other_noise_before_it():
    """Noise below V is uniform, or a copy of uniform noise earlier in the sample."""
    batch, num_indirect = batch_of(), 0
    for seed in range(5):
        noisy = jax.device_get(segments_of(jax.random.key(seed), batch, "uniform,ahead", 2))
        for b, t in zip(*np.nonzero(noisy.noise_offset), strict=True):
            past = noisy.input_tokens[b, t - batch.positions[b, t] : t]
            token = noisy.input_tokens[b, t]
            assert token < V or token in past
            num_indirect += token < V and token in past
    assert num_indirect > 5  # by chance, uniform noise repeats itself less than once


def test_the_first_kind_of_a_mixture_draws_what_it_draws_alone():
    batch, key = batch_of(), jax.random.key(0)
    alone, mixed = (jax.device_get(segments_of(key, batch, kind, 2)) for kind in ("uniform", "uniform,ahead"))
    np.testing.assert_array_equal(mixed.noise_offset, alone.noise_offset)
    is_same = (mixed.input_tokens == alone.input_tokens)[alone.noise_offset > 0]
    assert 0.3 < is_same.mean() < 0.7


def test_every_block_draws_one_of_the_kinds_with_equal_probability():
    batch, counts = batch_of(), np.zeros((4, 2), int)
    for seed in range(60):
        blocks = jax.device_get(blocks_of(jax.random.key(seed), batch, "token,ahead,uniform,drafts"))
        tokens = blocks.tokens.reshape(-1, L)
        kind = np.where((tokens == TOKEN).all(axis=1), 0, np.where((tokens >= V).all(axis=1), 1, 2))
        assert (tokens[kind == 2] < V).all()
        np.add.at(counts, (kind, blocks.drafted.ravel().astype(int)), 1)
    # One block in four holds drafts in the end; the first noise of those is one of the other three kinds.
    expected = np.outer([1 / 3, 1 / 3, 1 / 3, 0], [3 / 4, 1 / 4])
    assert counts.sum() == 60 * B * M
    assert chi_square.statistic(counts, expected) < 30.9  # 5 degrees of freedom, p = 1e-5


def test_drafts_begin_with_the_noise_that_the_other_kinds_have_without_them():
    batch, key = batch_of(), jax.random.key(2)
    ahead, mixed, alone = (blocks_of(key, batch, kind) for kind in ("ahead", "drafts,ahead", "drafts"))
    for other in (mixed, alone):
        for name in ("tokens", "starts", "valid"):
            np.testing.assert_array_equal(getattr(other, name), getattr(ahead, name))
    assert alone.drafted.all() and 0 < mixed.drafted.mean() < 1


@pytest.mark.parametrize("draw", [functools.partial(segments_of, segments=2), blocks_of], ids=["segments", "blocks"])
def test_kinds_of_a_row_depend_on_its_index_and_not_on_other_rows(draw):
    batch, key = batch_of(), jax.random.key(2)
    first, others = (jax.tree.map(lambda x, rows=rows: x[rows], batch) for rows in ([0] * B, [0, *[1] * (B - 1)]))
    kind = "uniform,ahead" if draw is not blocks_of else "token,ahead,uniform,drafts"
    one, other = (draw(key, rows, kind) for rows in (first, others))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[0], b[0]), one, other)
    assert (jax.tree.leaves(one)[0][0] != jax.tree.leaves(one)[0][1]).any()


# --- The curriculum


@pytest.mark.parametrize(("length", "steps"), [(4, 8), (4, 10), (3, 100), (5, 3), (1, 7), (2, 2**31 - 1)])
def test_the_last_offset_grows_in_equal_stages(length, steps):
    cfg = NoiseConfig(length=length, curriculum_steps=steps)
    numbers = [*range(120), 2**30 - 1, 2**30, 2**31 - 2]
    last = jax.jit(jax.vmap(lambda step: noise.curriculum(step, cfg)))(jnp.array(numbers, jnp.int32))
    assert last.tolist() == [min(length, 1 + step * length // steps) for step in numbers]
    assert noise.curriculum(jnp.int32(3), NoiseConfig()) is None


@pytest.mark.parametrize("kind", ["ahead", "uniform,ahead"])
def test_a_segment_is_clean_beyond_the_last_offset(kind):
    batch, key = batch_of(), jax.random.key(0)
    full = jax.device_get(segments_of(key, batch, kind, 2))
    for last in range(1, L + 1):
        noisy = jax.device_get(segments_of(key, batch, kind, 2, jnp.int32(last)))
        np.testing.assert_array_equal(noisy.noise_offset, np.where(full.noise_offset > last, 0, full.noise_offset))
        clean = noisy.noise_offset == 0
        np.testing.assert_array_equal(noisy.input_tokens[clean], batch.tokens[clean])
        assert (noisy.input_tokens != batch.tokens)[~clean].all()
    jax.tree.map(np.testing.assert_array_equal, noisy, full)  # the last of them


def test_blocks_do_not_count_beyond_the_last_offset():
    batch, cfg = batch_of(), NoiseConfig(length=L, blocks=M)
    build = jax.jit(lambda last: noise.build_inputs(jax.random.key(0), batch, cfg, V, last))
    full = jax.device_get(build(jnp.int32(L)))
    assert full.loss_mask[:, T:].all()
    for last in range(1, L):
        inputs = jax.device_get(build(jnp.int32(last)))
        counts = np.broadcast_to(np.arange(1, L + 1) <= last, (B, M, L)).reshape(B, M * L)
        np.testing.assert_array_equal(inputs.loss_mask[:, T:], counts)
        np.testing.assert_array_equal(inputs.noise_offset[:, T:], np.where(counts, full.noise_offset[:, T:], 0))
        np.testing.assert_array_equal(inputs.loss_mask[:, :T], full.loss_mask[:, :T])
        np.testing.assert_array_equal(inputs.input_tokens, full.input_tokens)
