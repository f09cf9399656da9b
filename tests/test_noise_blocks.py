"""Training inputs: labels, and noise blocks appended to the row."""

import dataclasses
import functools

import chi_square
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_params
import tiny_config

from msn_jax import llama, losses, masks, noise
from msn_jax.config import NoiseConfig
from msn_jax.noise import Batch

pytestmark = pytest.mark.usefixtures("quick_compilation")
V = 1000
B, T, M, L = 4, 48, 6, 3


def batch_of(rows: int = B) -> Batch:
    """Two samples per row, then padding; every token of the batch is unique."""
    tokens = np.arange(rows * T, dtype=np.int32).reshape(rows, T)
    positions = np.tile(np.concatenate([np.arange(20), np.arange(24), np.zeros(4)]).astype(np.int32), (rows, 1))
    segment_ids = np.tile(np.repeat([1, 2, 0], [20, 24, 4]).astype(np.int32), (rows, 1))
    response = (positions >= 6) & (segment_ids > 0)
    return Batch(tokens, positions, segment_ids, response)


def small_batch_of(rows: int, vocab_size: int) -> Batch:
    """The same for a small vocabulary."""
    batch = batch_of(rows)
    return Batch(batch.tokens % vocab_size, batch.positions, batch.segment_ids, batch.response_mask)


@functools.partial(jax.jit, static_argnames=("kind", "count"))
def blocks_of(key, batch, kind="ahead", count=M):
    return noise.draw_blocks(key, batch, NoiseConfig(kind, length=L, blocks=count), V)


def build_inputs(key, batch, cfg, vocab_size=V):
    return jax.jit(lambda key, batch: noise.build_inputs(key, batch, cfg, vocab_size))(key, batch)


def test_labels_are_the_next_response_token_of_the_same_sample():
    response = np.array([[0, 0, 1, 1, 0, 1, 1, 0]], bool)
    segment_ids = np.array([[1, 1, 1, 1, 2, 2, 2, 0]], np.int32)
    positions = np.array([[0, 1, 2, 3, 0, 1, 2, 0]], np.int32)
    inputs = noise.clean_inputs(Batch(np.arange(8, dtype=np.int32)[None], positions, segment_ids, response))
    np.testing.assert_array_equal(inputs.loss_mask, [[0, 1, 1, 0, 1, 1, 0, 0]])
    np.testing.assert_array_equal(inputs.labels[inputs.loss_mask], [2, 3, 5, 6])


def test_blocks_fit_into_responses_and_copy_earlier_tokens():
    batch = batch_of()
    for seed in range(30):
        blocks = blocks_of(jax.random.key(seed), batch)
        assert blocks.valid.all() and (blocks.num_skipped_samples == 0).all()
        for b in range(B):
            starts = np.asarray(blocks.starts[b])
            assert len(set(starts.tolist())) == M
            for start, tokens in zip(starts, np.asarray(blocks.tokens[b]), strict=True):
                sample = batch.segment_ids[b, start]
                assert (batch.segment_ids[b, start : start + L + 1] == sample).all()
                assert batch.response_mask[b, start : start + L + 1].all()
                past = set(batch.tokens[b, :start][batch.segment_ids[b, :start] == sample].tolist())
                assert set(tokens.tolist()) <= past


def test_inputs_positions_and_labels_of_blocks_and_row():
    batch = batch_of()
    cfg, key = NoiseConfig(length=L, blocks=M), jax.random.key(1)
    inputs, blocks = build_inputs(key, batch, cfg, V), blocks_of(key, batch)
    row = noise.clean_inputs(batch)
    for name in ("input_tokens", "positions", "labels", "loss_mask", "noise_offset"):
        np.testing.assert_array_equal(getattr(inputs, name)[:, :T], getattr(row, name))
    np.testing.assert_array_equal(inputs.input_tokens[:, T:].reshape(B, M, L), blocks.tokens)
    assert inputs.loss_mask[:, T:].all()
    assert (np.asarray(inputs.noise_offset)[:, T:].reshape(B, M, L) == np.arange(1, L + 1)).all()
    replaced = np.asarray(blocks.starts)[:, :, None] + np.arange(L)
    for b in range(B):
        np.testing.assert_array_equal(inputs.positions[b, T:].reshape(M, L), batch.positions[b, replaced[b]])
        np.testing.assert_array_equal(inputs.labels[b, T:].reshape(M, L), batch.tokens[b, replaced[b] + 1])


def test_the_teacher_reads_clean_tokens_where_the_block_reads_noise():
    """A block whose noise equals the clean tokens predicts what its teacher predicts, and has no gradient."""
    cfg = tiny_config.get_config()
    cfg.noise = NoiseConfig(length=L, blocks=M, self_distillation=True)
    params, batch = random_params.stacked(cfg.model), small_batch_of(2, cfg.model.vocab_size)
    inputs = build_inputs(jax.random.key(3), batch, cfg.noise, cfg.model.vocab_size)
    clean = jnp.take_along_axis(jnp.asarray(batch.tokens), inputs.teacher_positions, axis=1)
    np.testing.assert_array_equal(
        jnp.take_along_axis(inputs.positions, inputs.teacher_positions, axis=1), inputs.positions[:, T:]
    )
    without_noise = inputs.replace(input_tokens=inputs.input_tokens.at[:, T:].set(clean))

    def loss(params, inputs):
        values, _ = losses.token_losses(params, cfg, inputs)
        return values[:, T:].mean(), values

    gradient_of = jax.jit(jax.grad(loss, has_aux=True))
    gradient, _ = gradient_of(params, without_noise)
    assert max(abs(leaf).max() for leaf in jax.tree.leaves(gradient)) < 1e-5
    gradient, noisy = gradient_of(params, inputs)
    assert max(abs(leaf).max() for leaf in jax.tree.leaves(gradient)) > 1e-3
    plain = dataclasses.replace(cfg, noise=NoiseConfig(length=L, blocks=M))
    expected, _ = jax.jit(lambda: losses.token_losses(params, plain, inputs))()
    np.testing.assert_allclose(noisy[:, :T], expected[:, :T], atol=1e-5)  # the row is trained on its labels
    assert (abs(noisy - expected)[:, T:] > 1e-3).mean() > 0.9


def test_a_teacher_at_low_temperature_equals_its_argmax_as_label():
    cfg = tiny_config.get_config()
    cold = NoiseConfig(length=L, blocks=M, self_distillation=True, teacher_temperature=1e-6)
    cfg.noise = NoiseConfig(length=L, blocks=M)
    params, batch = random_params.stacked(cfg.model), small_batch_of(2, cfg.model.vocab_size)
    inputs = build_inputs(jax.random.key(3), batch, cfg.noise, cfg.model.vocab_size)

    @jax.jit
    def losses_of_both(params):
        hidden = llama.forward(params, cfg.model, inputs.input_tokens, inputs.positions, inputs.mask).hidden
        best = jnp.argmax(llama.unembed(params, cfg.model, hidden), axis=-1).astype(jnp.int32)
        labels = inputs.labels.at[:, T:].set(jnp.take_along_axis(best, inputs.teacher_positions, axis=1))
        distilled = dataclasses.replace(cfg, noise=cold)
        return losses.token_losses(params, cfg, inputs.replace(labels=labels))[0], losses.token_losses(
            params, distilled, inputs
        )[0]

    np.testing.assert_allclose(*losses_of_both(params), atol=1e-4)


def test_a_block_has_the_hidden_states_of_the_same_noise_within_the_row():
    """Hidden states of a block equal those of the row with the block in place; those of the row are unchanged."""
    cfg = tiny_config.get_config().model
    params = random_params.stacked(cfg)
    batch = small_batch_of(2, cfg.vocab_size)
    inputs = build_inputs(jax.random.key(3), batch, NoiseConfig(length=L, blocks=M), cfg.vocab_size)
    starts = blocks_of(jax.random.key(3), batch).starts
    hidden = llama.forward(params, cfg, inputs.input_tokens, inputs.positions, inputs.mask).hidden
    segments = masks.packed(jnp.asarray(batch.segment_ids))
    alone = llama.forward(params, cfg, jnp.asarray(batch.tokens), jnp.asarray(batch.positions), segments).hidden
    np.testing.assert_allclose(hidden[:, :T], alone, atol=2e-5)
    for b in range(2):
        for m in range(M):
            start, own = int(starts[b, m]), slice(T + m * L, T + (m + 1) * L)
            corrupted = jnp.asarray(batch.tokens).at[b, start : start + L].set(inputs.input_tokens[b, own])
            expected = llama.forward(params, cfg, corrupted, jnp.asarray(batch.positions), segments).hidden
            np.testing.assert_allclose(hidden[b, own], expected[b, start : start + L], atol=2e-5)


def test_responses_that_are_too_short_get_no_blocks_and_are_counted():
    batch = batch_of()
    response = batch.response_mask.copy()
    response[:, :20] = False
    response[:, 6 : 6 + L] = True  # L tokens: no label follows the block
    blocks = blocks_of(jax.random.key(0), Batch(batch.tokens, batch.positions, batch.segment_ids, response), count=40)
    assert (blocks.num_skipped_samples == 1).all()
    assert (blocks.starts[blocks.valid[..., 0]] >= 20).all()
    assert blocks.valid.sum(axis=1).tolist() == [[18 - L] * L] * B  # as many as there are starts
    inputs = build_inputs(jax.random.key(0), batch, NoiseConfig(length=L, blocks=40), V)
    idle = (inputs.noise_offset[:, T:] == 0) == ~inputs.loss_mask[:, T:]
    assert idle.all() and (~inputs.loss_mask[:, T:]).any()


def test_starts_and_noise_tokens_are_uniform():
    batch = batch_of(1)
    keys = jax.random.split(jax.random.key(5), 6000)
    drawn = jax.jit(jax.vmap(lambda key: noise.draw_blocks(key, batch, NoiseConfig(length=L, blocks=1), V)))(keys)
    counts = np.bincount(np.asarray(drawn.starts).ravel(), minlength=T)
    free = np.r_[6 : 20 - L, 26 : 44 - L]
    assert counts.sum() == counts[free].sum()
    uniform = np.full(len(free), 1 / len(free))
    assert chi_square.statistic(counts[free], uniform) < 52.62  # 25 degrees of freedom, p = 0.001
    first = np.asarray(drawn.tokens)[np.asarray(drawn.starts)[:, 0, 0] == 10, 0, 0, 0]
    counts = np.bincount(first, minlength=10)
    assert len(first) > 150 and chi_square.statistic(counts, np.full(10, 0.1)) < 27.88  # 9 degrees, p = 0.001


def test_rows_have_different_noise_that_does_not_depend_on_the_batch():
    batch = batch_of(1)
    twice = Batch(*(np.repeat(values, 2, axis=0) for values in jax.tree.leaves(batch)))
    blocks = blocks_of(jax.random.key(0), twice)
    assert (blocks.starts[0] != blocks.starts[1]).any()
    alone = blocks_of(jax.random.key(0), batch)
    np.testing.assert_array_equal(blocks.starts[0], alone.starts[0])  # depends on the row's index only
    np.testing.assert_array_equal(blocks.tokens[0], alone.tokens[0])


def test_uniform_noise_covers_the_vocabulary():
    tokens = np.concatenate([np.ravel(blocks_of(jax.random.key(n), batch_of(), "uniform").tokens) for n in range(9)])
    assert tokens.min() >= 0 and tokens.max() < V and tokens.max() > B * T
