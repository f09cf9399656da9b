"""Blocks that hold the model's own drafts: which tokens they are, that they have no gradient, and whole runs."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_params
import tiny_config

from msn_jax import adapter, checkpoint, gated, llama, losses, masks, noise, optim, train, train_steps
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


def blocks_of(cfg, batch):
    return jax.device_get(jax.jit(lambda: noise.draw_blocks(KEY, batch, cfg.noise, cfg.model.vocab_size))())


def expected_tokens(cfg, params, factors, batch, blocks):
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


def assert_same(values, expected):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), values, expected)


@pytest.mark.parametrize("rank", [0, 4])
def test_drafts_are_the_predictions_of_a_plain_forward_pass_and_have_no_gradient(rank):
    cfg = config(rank)
    (params, factors), batch = model_of(cfg), batch_of(cfg)
    blocks = blocks_of(cfg, batch)
    inputs = jax.jit(lambda: noise.build_inputs(KEY, batch, cfg.noise, cfg.model.vocab_size))()
    tokens = expected_tokens(cfg, params, factors, batch, blocks).reshape(B, M * L)
    expected = inputs.replace(input_tokens=jnp.concatenate([jnp.asarray(batch.tokens), tokens], axis=1))

    def loss(trained, inputs, draft):
        model = (trained, None) if factors is None else (params, trained)
        inputs = redraft_inputs(model[0], cfg, inputs, model[1]) if draft else inputs
        values, _ = losses.token_losses(model[0], cfg, inputs, model[1])
        return jnp.mean(values, where=inputs.loss_mask), inputs

    gradient_of = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=2)
    trained = params if factors is None else factors
    (value, drafted), gradient = gradient_of(trained, inputs, True)
    jax.tree.map(np.testing.assert_array_equal, drafted, expected)
    (constant, _), expected_gradient = gradient_of(trained, expected, False)
    assert_same((value, gradient), (constant, expected_gradient))


def test_blocks_of_a_gated_adapter_hold_its_drafts_without_gradient():
    cfg = config(4, "noise", "token,drafts")
    (params, factors), batch = model_of(cfg), batch_of(cfg)
    blocks = blocks_of(cfg, batch)
    constant = blocks.replace(tokens=expected_tokens(cfg, params, factors, batch, blocks), drafted=None)

    def loss(factors, blocks):
        results = gated.block_losses(factors, params, cfg, batch, blocks)
        return gated.loss(results, cfg), results

    gradient_of = jax.jit(jax.value_and_grad(loss, has_aux=True))
    assert_same(gradient_of(factors, blocks), gradient_of(factors, constant))


def test_a_training_step_redrafts_with_the_parameters_of_that_step():
    cfg = config()
    cfg.noise.curriculum_steps = 9
    params, batch = random_params.stacked(cfg.model), batch_of(cfg)
    optimizer = optim.optimizer(cfg.optim, cfg.train.steps)
    step = jax.jit(functools.partial(train_steps.train_step, cfg=cfg, optimizer=optimizer))

    @jax.jit
    def losses_of(number):
        key = jax.random.fold_in(jax.random.key(cfg.train.seed), number)
        inputs = noise.build_inputs(key, batch, cfg.noise, cfg.model.vocab_size)
        return losses.token_losses(params, cfg, redraft_inputs(params, cfg, inputs))[0], inputs

    for number, last in ((2, 1), (3, 2), (6, 3)):
        _, metrics = step(train.TrainState(jnp.int32(number), params, optimizer.init(params)), batch)
        values, inputs = losses_of(number)
        counts = np.asarray(inputs.loss_mask & (inputs.noise_offset <= last))
        assert metrics["loss"] == pytest.approx(np.asarray(values)[counts].mean(), rel=1e-5)
        assert metrics["response_tokens"] == counts.sum()


# --- Whole runs of a gated adapter, with a curriculum


def run(cfg, workdir):
    assert train.train(cfg, workdir)
    lines = (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The directory, config and log of a run of 6 steps."""
    directory = tmp_path_factory.mktemp("redraft")
    tiny_config.write_data(directory / "train.jsonl")
    base = tiny_config.config_in(directory, steps=1)
    base.noise.kind = "none"
    run(base, directory / "base")
    cfg = tiny_config.config_in(directory, steps=6, checkpoint_every=2, init_from=str(directory / "base"))
    adapted = config(4, "noise", "ahead,token,drafts")
    cfg.noise, cfg.adapter = adapted.noise, adapted.adapter
    cfg.noise.curriculum_steps = 4
    return directory, cfg, run(cfg, directory / "run")


def test_offsets_join_the_training_step_by_step_and_all_are_evaluated(finished):
    _, _, log = finished
    trained = [[value is not None for value in line["noise_accuracy"]] for line in log]
    assert [sum(offsets) for offsets in trained] == [1, 1, 2, 3, 3, 3]  # stages of 4/3 steps
    assert trained[2] == [True, True, False]
    assert None not in log[-1]["eval_noise_accuracy"]


def test_a_killed_run_resumes_in_the_same_stage_bit_for_bit(finished, monkeypatch):
    directory, cfg, log = finished
    save = train.checkpoint.save

    def killed(manager, step, *rest):
        save(manager, step, *rest)
        raise KeyboardInterrupt

    monkeypatch.setattr(train.checkpoint, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        run(cfg, directory / "killed")
    monkeypatch.undo()
    resumed = run(cfg, directory / "killed")
    assert [line["loss"] for line in resumed] == [line["loss"] for line in log]
    first, second = (adapter.load(directory / name / checkpoint.ADAPTER, cfg.model) for name in ("run", "killed"))
    assert first.noise_token == second.noise_token == TOKEN
    jax.tree.map(np.testing.assert_array_equal, first.params, second.params)
