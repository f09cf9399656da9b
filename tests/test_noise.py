"""Noise segments within the row: ahead noise and uniform noise."""

import functools
import itertools

import chi_square
import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from msn_jax import sharding
from msn_jax.config import MeshConfig, NoiseConfig
from msn_jax.noise import Batch, build_inputs, corrupt

pytestmark = pytest.mark.usefixtures("quick_compilation")
V = 1000


def rows_of(conversations, row_length):
    """One row per list of samples; a sample is a list of (length, is_response). Every token is unique."""
    shape = (len(conversations), row_length)
    tokens = np.arange(np.prod(shape), dtype=np.int32).reshape(shape)
    positions, segment_ids = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    response = np.zeros(shape, bool)
    for b, samples in enumerate(conversations):
        at = 0
        for number, turns in enumerate(samples, 1):
            start = at
            for length, is_response in turns:
                response[b, at : at + length] = is_response
                at += length
            positions[b, start:at] = np.arange(at - start)
            segment_ids[b, start:at] = number
    return Batch(tokens, positions, segment_ids, response)


def random_conversations(rng, count, row_length):
    rows = []
    for _ in range(count):
        samples, left = [], row_length - int(rng.integers(0, 8))
        while left >= 3:
            turns = []
            first = int(rng.integers(0, 2))  # some samples begin with a response
            for turn in range(first, 2 * int(rng.integers(1, 3))):
                length = min(int(rng.integers(1, 14)), left)
                if length:
                    turns.append((length, turn % 2 == 1))
                    left -= length
            samples.append(turns)
        rows.append(samples)
    return rows


@functools.partial(jax.jit, static_argnames=("kind", "segments", "length"))
def noisy_batch(key, batch, kind, segments, length):
    return corrupt(key, batch, NoiseConfig(kind, segments, length), V)


def segments_of(offset):
    """(start, end) of the noise segments of one row: runs of offsets 1, 2, ..., length."""
    starts = np.flatnonzero(offset == 1)
    ends = [next((i for i in range(s + 1, len(offset)) if offset[i] != i - s + 1), len(offset)) for s in starts]
    return list(zip(starts, ends, strict=True))


def turns_of(batch, b):
    """(start, end) of the runs of response tokens of one row, split at sample boundaries."""
    inside = np.where(batch.response_mask[b], batch.segment_ids[b], 0)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], inside, [0]])))
    return [(s, e) for s, e in itertools.pairwise(edges) if inside[s]]


@pytest.mark.parametrize(("kind", "segments", "length"), [("ahead", 1, 4), ("ahead", 3, 2), ("uniform", 2, 5)])
def test_segments_lie_in_responses_and_copy_earlier_tokens(kind, segments, length):
    for seed in range(6):
        batch = rows_of(random_conversations(np.random.default_rng(seed), 8, 64), 64)
        before = jax.tree.map(np.copy, batch)
        noisy = jax.device_get(noisy_batch(jax.random.key(seed), batch, kind, segments, length))
        jax.tree.map(np.testing.assert_array_equal, batch, before)  # labels are the batch's tokens
        noise = noisy.noise_offset > 0
        assert noise.any()
        np.testing.assert_array_equal(noisy.input_tokens[~noise], batch.tokens[~noise])
        assert batch.response_mask[noise].all() and (batch.positions[noise] > 0).all()
        for b in range(8):
            spans, turns = segments_of(noisy.noise_offset[b]), turns_of(batch, b)
            assert sum(e - s for s, e in spans) == noise[b].sum()  # every noise position is part of a run 1, 2, ...
            assert all(e - s == length for s, e in spans)
            assert all(any(ts <= s and e <= te for ts, te in turns) for s, e in spans)
            per_sample = np.bincount(batch.segment_ids[b, [s for s, _ in spans]], minlength=1)
            assert per_sample.max(initial=0) <= segments
            long_enough = {
                batch.segment_ids[b, s] for s, e in turns if e - max(s, s + (batch.positions[b, s] == 0)) >= length
            }
            assert set(np.flatnonzero(per_sample)) == long_enough  # every sample long enough has noise
            assert noisy.num_skipped_samples[b] == batch.segment_ids[b].max() - len(long_enough)
            if kind == "ahead":
                for t in np.flatnonzero(noise[b]):
                    past = batch.tokens[b, t - batch.positions[b, t] : t]
                    assert noisy.input_tokens[b, t] in past


def test_samples_that_are_too_short_stay_clean_and_are_counted():
    batch = rows_of([[[(3, False), (3, True)], [(2, False), (4, True)]], [[(1, False), (2, True)]]], 16)
    noisy = noisy_batch(jax.random.key(0), batch, "ahead", 1, 4)
    np.testing.assert_array_equal(noisy.num_skipped_samples, [1, 1])
    np.testing.assert_array_equal(noisy.noise_offset[0], [0] * 8 + [1, 2, 3, 4] + [0] * 4)
    np.testing.assert_array_equal(noisy.input_tokens[1], batch.tokens[1])


def test_noise_copies_of_noise_equal_the_first_clean_token():
    """One clean token, then only noise: every copy, direct or indirect, is that token."""
    batch = rows_of([[[(1, False), (40, True)]]] * 8, 41)
    noisy = noisy_batch(jax.random.key(0), batch, "ahead", 1, 40)
    np.testing.assert_array_equal(noisy.noise_offset, [range(41)] * 8)
    np.testing.assert_array_equal(noisy.input_tokens, np.repeat(batch.tokens[:, :1], 41, axis=1))


def test_kind_none_changes_nothing():
    batch = rows_of([[[(3, False), (9, True)]]], 16)
    noisy = noisy_batch(jax.random.key(0), batch, "none", 1, 4)
    np.testing.assert_array_equal(noisy.input_tokens, batch.tokens)
    assert not np.any(noisy.noise_offset) and not np.any(noisy.num_skipped_samples)


def test_uniform_noise_covers_the_vocabulary():
    batch = rows_of([[[(2, False), (30, True)]]] * 64, 32)
    noisy = jax.device_get(noisy_batch(jax.random.key(0), batch, "uniform", 1, 30))
    drawn = noisy.input_tokens[noisy.noise_offset > 0]
    assert drawn.min() < V // 50 and drawn.max() > V - V // 50 and drawn.max() < V


@pytest.mark.parametrize(
    "noise",
    [
        NoiseConfig(segments=2),
        NoiseConfig(blocks=5),
        NoiseConfig("ahead,uniform", segments=2),
        NoiseConfig("uniform,drafts,ahead", blocks=5),
    ],
    ids=["segments", "blocks", "mixed segments", "mixed blocks"],
)
def test_noise_is_the_same_on_one_and_on_eight_devices(noise):
    batch = rows_of(random_conversations(np.random.default_rng(3), 16, 48), 48)
    rows = sharding.batch_sharding(sharding.make_mesh(MeshConfig(data=4, fsdp=2)), 16)
    corrupt = functools.partial(build_inputs, cfg=noise, vocab_size=V)
    replicated = NamedSharding(rows.mesh, PartitionSpec())
    sharded = jax.jit(corrupt, in_shardings=(replicated, rows), out_shardings=rows)(jax.random.key(1), batch)
    assert len(sharded.input_tokens.sharding.device_set) == 8
    jax.tree.map(np.testing.assert_array_equal, sharded, jax.jit(corrupt)(jax.random.key(1), batch))


def test_noise_of_a_row_does_not_depend_on_other_rows():
    conversations = random_conversations(np.random.default_rng(5), 4, 48)
    batch = rows_of(conversations, 48)
    alone = jax.tree.map(lambda x: x[:1], batch)
    many, one = (noisy_batch(jax.random.key(2), b, "ahead", 2, 3) for b in (batch, alone))
    np.testing.assert_array_equal(many.input_tokens[0], one.input_tokens[0])


def test_starts_and_noise_tokens_are_uniform():
    """Prompt of 4 tokens, response of 5, segments of 2: starts are 4..7. Chi-square limits at p = 1e-5."""
    count = 20_000
    batch = jax.tree.map(lambda x: np.tile(x, (count, 1)), rows_of([[[(4, False), (5, True)]]], 9))
    noisy = jax.device_get(noisy_batch(jax.random.key(7), batch, "ahead", 1, 2))
    starts = np.argmax(noisy.noise_offset == 1, axis=1)
    assert chi_square.statistic(np.bincount(starts, minlength=9)[4:8], [1 / 4] * 4) < 25.9
    assert not np.bincount(starts, minlength=9)[[0, 1, 2, 3, 8]].any()

    first, second = (noisy.input_tokens[np.arange(count), starts + i] for i in (0, 1))  # tokens are their positions
    for start in range(4, 8):
        here = starts == start
        # Offset 1: uniform over the `start` tokens before it.
        counts = np.bincount(first[here], minlength=9)
        assert not counts[start:].any()
        assert chi_square.statistic(counts[:start], [1 / start] * start) < 33.1
        # Offset 2: uniform over start + 1 tokens, of which the last is the noise at offset 1, not the clean token.
        assert not np.any(second[here] == start)
        copies = np.bincount((second[here] == first[here]).astype(int), minlength=2)
        probability = 2 / (start + 1)  # the past token itself, or its copy in the noise
        assert chi_square.statistic(copies, [1 - probability, probability]) < 19.5
        assert chi_square.statistic(np.bincount(second[here], minlength=9)[:start], [1 / start] * start) < 33.1
