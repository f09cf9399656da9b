"""Blocks that hold the model's own drafts: which tokens they are, and that they have no gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import random_params
import tiny_config

from msn_jax import adapter, gated, llama, losses, masks, noise, optim, train_steps
from msn_jax.config import AdapterConfig, NoiseConfig
from msn_jax.noise import Batch
from msn_jax.redraft import redraft_inputs

pytestmark = pytest.mark.usefixtures("quick_compilation")
TOKEN = 7
B, T, M, L = 2, 32, 5, 3
KEY = jax.random.key(3)


@pytest.fixture(autouse=True, scope="module")
def promotion():
    with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
        yield


def config(rank=0, gate="all", kind="ahead,drafts"):
    cfg = tiny_config.get_config()
    cfg.noise = NoiseConfig(kind, length=L, blocks=M, token=TOKEN)
    cfg.adapter = AdapterConfig(rank=rank, alpha=8.0, gate=gate, first_layer=1 if rank else 0)
    return cfg


def model_of(cfg):
    """The parameters of the model, and an adapter that changes its predictions."""
    if not cfg.adapter.rank:
        return random_params.stacked(cfg.model), None
    new = adapter.init(jax.random.key(0), cfg.model, cfg.adapter)
    factors = {
        name: (a.value, jax.random.normal(jax.random.fold_in(KEY, index), b.value.shape))
        for index, (name, (a, b)) in enumerate(new.items())
    }
    return random_params.stacked(cfg.model), factors


def batch_of(cfg):
    tokens = np.random.default_rng(0).integers(0, cfg.model.vocab_size, (B, T), np.int32)
    positions = np.tile(np.concatenate([np.arange(12), np.arange(20)]).astype(np.int32), (B, 1))
    return Batch(tokens, positions, np.repeat([[1, 2]] * B, [12, 20], axis=1).astype(np.int32), positions >= 2)


def blocks_of(key, cfg, batch):
    return jax.device_get(jax.jit(lambda: noise.draw_blocks(key, batch, cfg.noise, cfg.model.vocab_size))())


def inputs_of(key, cfg, batch):
    return jax.jit(lambda: noise.build_inputs(key, batch, cfg.noise, cfg.model.vocab_size))()


def expected_tokens(cfg, factors, batch, blocks):
    """The blocks' tokens, by a forward pass over every block behind the tokens of its sample, in decoding layout."""
    weights = random_params.unstacked(cfg.model)
    adapted = None if factors is None else adapter.decode_layout(factors, cfg.adapter)
    positions = jnp.arange(T, dtype=jnp.int32)[None]

    @jax.jit
    def predict(sequence, begin):
        gate = positions >= begin if cfg.adapter.gate == "noise" and factors else None
        inputs = sequence[None], positions, masks.causal(T)
        hidden = llama.forward(weights, cfg.model, *inputs, adapter=adapted, gate=gate).hidden
        return jnp.argmax(llama.unembed(weights, cfg.model, hidden), axis=-1)[0]

    tokens = np.array(blocks.tokens)
    for b, m in np.argwhere(blocks.drafted):
        start = int(blocks.starts[b, m])
        begin = int(batch.positions[b, start])  # of the block, in its sample
        sequence = np.zeros(T, np.int32)  # no token attends to what follows the block
        sequence[:begin], sequence[begin : begin + L] = batch.tokens[b, start - begin : start], tokens[b, m]
        tokens[b, m, 1:] = predict(sequence, begin)[begin : begin + L - 1]
    changed = (tokens != blocks.tokens).any(axis=-1)
    assert changed[blocks.drafted].all() and 0 < blocks.drafted.mean() < 1
    return jnp.asarray(tokens)


def step_metrics(cfg, trained, frozen, batch, number):
    """The metrics of a training step after `number` others, and its key."""
    optimizer = optim.optimizer(cfg.optim, cfg.train.steps)
    state = train_steps.TrainState(jnp.int32(number), trained, optimizer.init(trained))
    step = jax.jit(functools.partial(train_steps.train_step, cfg=cfg, optimizer=optimizer))
    return step(state, batch, frozen)[1], jax.random.fold_in(jax.random.key(cfg.train.seed), number)


def assert_same(metrics, loss_and_gradient):
    loss, gradient = loss_and_gradient
    assert metrics["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert metrics["grad_norm"] == pytest.approx(float(optax.global_norm(gradient)), rel=1e-4)


@pytest.mark.parametrize("rank", [0, 4])
def test_drafts_are_the_predictions_of_a_plain_forward_pass(rank):
    cfg = config(rank)
    (params, factors), batch = model_of(cfg), batch_of(cfg)
    blocks = blocks_of(KEY, cfg, batch)
    inputs = inputs_of(KEY, cfg, batch)
    drafted = jax.jit(lambda: redraft_inputs(params, cfg, inputs, factors))()
    np.testing.assert_array_equal(drafted.input_tokens[:, :T], batch.tokens)
    expected = expected_tokens(cfg, factors, batch, blocks)
    np.testing.assert_array_equal(drafted.input_tokens[:, T:].reshape(B, M, L), expected)
    rest = (one.replace(input_tokens=None) for one in (drafted, inputs))
    jax.tree.map(np.testing.assert_array_equal, *rest)


def test_a_step_treats_drafts_as_constants():
    cfg, (params, _) = config(), model_of(config())
    cfg.noise.curriculum_steps = 9
    batch = batch_of(cfg)
    metrics, key = step_metrics(cfg, params, None, batch, 4)
    inputs = inputs_of(key, cfg, batch)
    inputs = jax.jit(lambda: redraft_inputs(params, cfg, inputs))()
    counts = inputs.loss_mask & (inputs.noise_offset <= 2)  # the second stage
    assert metrics["response_tokens"] == counts.sum() < inputs.loss_mask.sum()

    def loss(params):
        return jnp.mean(losses.token_losses(params, cfg, inputs)[0], where=counts)

    assert_same(metrics, jax.jit(jax.value_and_grad(loss))(params))


def test_a_step_of_a_gated_adapter_treats_its_drafts_as_constants():
    cfg = config(4, "noise", "token,drafts")
    cfg.noise.curriculum_steps = 9
    cfg.noise.acceptance_weights = False  # with random parameters, they would hide all offsets but the first
    (params, factors), batch = model_of(cfg), batch_of(cfg)
    metrics, key = step_metrics(cfg, factors, params, batch, 4)
    blocks = blocks_of(key, cfg, batch)
    valid = jnp.asarray(blocks.valid & (np.arange(1, L + 1) <= 2))
    assert metrics["block_tokens"] == valid.sum() < blocks.valid.sum()
    constant = blocks.replace(tokens=expected_tokens(cfg, factors, batch, blocks), valid=valid, drafted=None)

    def loss(factors):
        return gated.loss(gated.block_losses(factors, params, cfg, batch, constant), cfg)

    assert_same(metrics, jax.jit(jax.value_and_grad(loss))(factors))
